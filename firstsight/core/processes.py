"""Several processes at one stage, as `accelerate launch` starts them: one writes, all read."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


@contextmanager
def shared(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """The folder that the main process makes, in every process; left when all are done with it."""
    state = PartialState()
    with ExitStack() as stack:
        made = [stack.enter_context(folder) if state.is_main_process else None]
        broadcast_object_list(made)
        yield made[0]
        state.wait_for_everyone()

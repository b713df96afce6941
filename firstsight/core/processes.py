"""Several processes of one stage, as `accelerate launch` starts them: the main process writes, all of them read."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


@contextmanager
def shared(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield the folder that the main process creates to every process; close it when all processes are done."""
    state = PartialState()
    with ExitStack() as stack:
        made: list[Any] = [stack.enter_context(folder) if state.is_main_process else None]
        broadcast_object_list(made)
        yield made[0]
        state.wait_for_everyone()

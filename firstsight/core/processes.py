"""Several processes of one stage, one for each GPU: the main process writes, all of them read."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

# Set by accelerate and by torch's launcher for each process that they start.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "RANK")


def is_main_process() -> bool:
    """Return whether this is the first process of a stage, or its only one; needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def use_all_gpus(device: str) -> None:
    """Replace this process by `accelerate launch`, which starts its stage once for each GPU, if there are several.

    So too if the user has a file of `accelerate config`, for FSDP and the like. One process needs no launcher, which
    would import torch for itself before it starts the stage. Return if this process was launched already, or is not a
    stage's own.

    Args:
        device: `runtime.device`.
    """
    module = sys.modules["__main__"].__spec__
    if module is None or not module.name.startswith("stages.") or any(name in os.environ for name in _LAUNCHED):
        return
    # Imported here, because they take seconds, and a stage that is left out needs neither.
    import torch
    from accelerate.commands.config.config_args import default_config_file

    configured = Path(default_config_file).is_file()
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    if configured or gpus > 1:
        os.execv(sys.executable, [*launcher(None if configured else gpus), "-m", module.name, *sys.argv[1:]])


def launcher(processes: int | None) -> list[str]:
    """Return the command that starts as many processes on this machine, or as the file of `accelerate config` says."""
    named = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)] if processes else []
    common = ["--quiet", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *common, *named]


@contextmanager
def shared(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield the folder that the main process creates to every process; close it when all processes are done."""
    # Imported here, because a stage that is left out needs no torch.
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    with ExitStack() as stack:
        made: list[Any] = [stack.enter_context(folder) if state.is_main_process else None]
        broadcast_object_list(made)
        yield made[0]
        state.wait_for_everyone()

"""Several processes of one stage, one for each GPU: all of them work, and the main process writes."""

import math
import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from firstsight.core import launch
from firstsight.core.cores import cores

T = TypeVar("T")

# Set by accelerate and by torch's launcher for each process that they start.
_LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "RANK")
# Set by Slurm in a job: the number of its nodes.
_NODES = "SLURM_JOB_NUM_NODES"
_LAUNCH = [sys.executable, "-m", launch.__name__, "--quiet", "--mixed_precision", "no", "--dynamo_backend", "no"]
# The errors, of what processes exchange data by, when another has gone; torch has no class for them.
_GONE = re.compile(
    r"(gloo|NCCL|TCPStore|Dist\w+Error).*((closed|reset) by peer|Broken pipe|remote process|likely closed)", re.DOTALL
)
# Results that a process computes before all hand theirs over. Processes wait for the slowest each time: with more of
# them, slow and quick ones are balanced; with fewer, less is lost when the stage is ended.
_TOGETHER = 8
# How long a process waits for another that is still alive: hours may pass while the main process writes.
_PATIENCE = timedelta(days=7)
_SECONDS_TO_ASK = 5


def is_main_process() -> bool:
    """Return whether this is the first process of a stage, or its only one; needs no torch."""
    return os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """Return how many processes of this stage run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def use_all_gpus(device: str) -> None:
    """Replace this process by `accelerate launch`, which starts its stage once for each GPU, if there are several.

    So too if the user has a file of `accelerate config`, for FSDP and the like, and in a job of Slurm with several
    nodes, on each of which `srun` starts it. One process needs no launcher, which would import torch for itself before
    it starts the stage. Return if this process was launched already, or is not a stage's own.

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
    nodes = int(os.environ.get(_NODES, "1"))
    stage = ["-m", module.name, *sys.argv[1:]]
    if nodes > 1:
        # To srun's tasks DVC would seem to have died, for it is not above them (`firstsight.core.launchers`).
        environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
        os.execvpe("srun", [*on_nodes(nodes, max(gpus, 1), configured), *stage], environment)
    if configured or gpus > 1:
        os.execv(sys.executable, [*launcher(None if configured else gpus), *stage])


def launcher(processes: int | None) -> list[str]:
    """Return the command that starts as many processes on this machine, or as the file of `accelerate config` says."""
    # Port 0: any that is free, so that stages of two clones run beside each other.
    here = ["--num_machines", "1", "--main_process_port", "0"]
    return [*_LAUNCH, *(["--multi_gpu", *here, "--num_processes", str(processes)] if processes else [])]


def on_nodes(nodes: int, processes: int, configured: bool) -> list[str]:
    """Return the command that starts so many processes on each of the nodes of a job of Slurm, of which this is one.

    A task of srun on each node launches the node's processes. When one fails, srun ends the others.

    Args:
        configured: whether there is a file of `accelerate config`, which says how they work together.
    """
    from accelerate.utils.other import get_free_port  # takes seconds

    tasks = ["srun", "--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
    here = ["--main_process_ip", socket.gethostname(), "--main_process_port", str(get_free_port())]
    there = ["--num_machines", str(nodes), "--num_processes", str(nodes * processes), *here]
    how = [] if configured else ["--multi_gpu"]
    return [*tasks, "--cpu-bind", "none", "--kill-on-bad-exit", *_LAUNCH, *how, *there]


@contextmanager
def shared(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """Yield the folder that the main process creates to every process; close it when all processes are done."""
    with ExitStack() as stack:
        yield from_main(stack.enter_context(folder) if is_main_process() else None)
        wait_for_all()


def share(items: Sequence[T]) -> Sequence[T]:
    """Return what this process has of work that all processes share: its every n-th item, n being their number."""
    rank, processes = _place()
    return items[rank::processes]


def collected(results: Iterable[T], total: int) -> Iterator[T]:
    """Yield in the main process what all processes make of their shares, in the order of the items; elsewhere nothing.

    One process gets its own results as it makes them. Several hand theirs over a few at a time, pickled, so that
    tensors among them must be on the CPU.

    Args:
        results: one for each item of this process's `share`, made when they are asked for.
        total: the number of items of all processes.
    """
    rank, processes = _place()
    if processes == 1:
        yield from results
        return
    from torch.distributed import gather_object

    own = iter(results)
    for _ in range(math.ceil(total / (processes * _TOGETHER))):
        made = list(islice(own, _TOGETHER))
        parts: list[list[T]] = [[] for _ in range(processes)]
        gather_object(made, parts if rank == 0 else None, group=_group())
        # The first process has as many as any other: shares are dealt in turn.
        yield from (part[number] for number in range(len(parts[0])) for part in parts if number < len(part))


def from_main(value: Any) -> Any:
    """Return the main process's value in every process, when it has come to this point."""
    if _place()[1] == 1:
        return value
    from torch.distributed import broadcast_object_list

    held = [value]
    broadcast_object_list(held, group=_group())
    return held[0]


def in_any(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set in any process; all of them call this, with as many flags."""
    if _place()[1] == 1:
        return list(flags)
    import torch
    from torch.distributed import ReduceOp, all_reduce

    found = torch.tensor(flags, dtype=torch.uint8)
    all_reduce(found, ReduceOp.MAX, group=_group())
    return found.bool().tolist()


def wait_for_all() -> None:
    """Return when every process has come to this point."""
    if _place()[1] > 1:
        from torch.distributed import barrier

        barrier(group=_group())


def first_to_fail() -> bool:
    """Return whether no other process of this stage has failed before this one: only the first says why.

    Processes ask the store at which the launcher had them meet, which outlives them.
    """
    if _place()[1] == 1:
        return True
    from torch.distributed import TCPStore

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_ASK))
        return store.add("firstsight/failed", 1) == 1
    except (KeyError, RuntimeError):  # no such store, or the node that had it has gone
        return True


def has_lost_another(error: BaseException) -> bool:
    """Return whether the error is that another process of this stage has gone."""
    return bool(_GONE.search(f"{type(error).__name__}: {error}")) and _place()[1] > 1


@contextmanager
def all_cores() -> Iterator[None]:
    """Have torch compute in the block with as many threads as the only process of a stage, while the others wait."""
    if _place()[1] == 1:
        yield
        return
    import torch

    own = torch.get_num_threads()
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.set_num_threads(own)


def _place() -> tuple[int, int]:
    """Return this process's number among all, and how many they are, as the launcher has set them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@cache
def _group() -> Any:
    """Return the group in which processes exchange Python objects, by gloo, on the CPU, also where they train by NCCL.

    There, whoever waits learns at once that another process has died, and may wait for long.
    """
    from torch.distributed import new_group

    return new_group(backend="gloo", timeout=_PATIENCE)

"""Count the cores that this process may use, which may be fewer than the machine has."""

import math
import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return how many cores this process is bound to (all, if to none), and at most what its container may use."""
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS binds no process
        bound = os.cpu_count() or 1
    return max(1, math.ceil(min(bound, share(_GROUP))))


def share(group: Path) -> float:
    """Return how many cores' time a Linux control group may use (`docker run --cpus`); infinity without a limit.

    With more threads than that, all of them are halted for the rest of each period once they have used it up.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        with suppress(OSError, ValueError):  # "max" is not a number
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf

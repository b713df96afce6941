"""How many cores this process may use, which may be fewer than the machine has."""

import math
import os
from contextlib import suppress
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Those it is bound to, or all; no more than a container's share of time is worth (`docker run --cpus`)."""
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS binds no process
        bound = os.cpu_count() or 1
    return max(1, math.ceil(min(bound, share(_GROUP))))


def share(group: Path) -> float:
    """The cores whose time a control group grants, as Linux shows it in its folder; infinite where it limits nothing.

    Threads beyond that would all be halted for the rest of each period once they have spent it.
    """
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # version 2, version 1
        with suppress(OSError, ValueError):  # "max" is no number
            quota, period = map(int, " ".join((group / name).read_text() for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf

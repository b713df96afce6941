"""End a stage when its launcher has died: DVC and accelerate, when killed, leave running what they started.

This needs Linux with /proc; elsewhere nothing is watched.
"""

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Set by a launcher for what it starts: by DVC, by accelerate, by the torchrun inside accelerate, and by ours.
_DVC, SIDE_BY_SIDE = "DVC_STAGE", "FIRSTSIGHT_SIDE_BY_SIDE"
_MARKS = (_DVC, "ACCELERATE_", "TORCHELASTIC_RUN_ID", SIDE_BY_SIDE)
_WATCHED = sys.platform == "linux" and Path("/proc/self/stat").exists()
# Seconds between SIGTERM and SIGKILL: enough for a checkpoint.
_GRACE = 120
# Seconds between checks where the kernel does not report that a process has died.
_LOOKS = 0.5


def end_with_launchers() -> None:
    """Send this process SIGTERM when a launcher above it has died, and SIGKILL two minutes later; return at once."""
    if _WATCHED:
        threading.Thread(target=_watch_launchers, daemon=True).start()


def end_with(process: int) -> None:
    """Do as `end_with_launchers` when the process with the id `process` has died."""
    if _WATCHED:
        threading.Thread(target=_watch, args=([process],), daemon=True).start()


def _watch_launchers() -> None:
    try:
        launchers = _launchers()
    except (OSError, psutil.NoSuchProcess):  # one died meanwhile
        launchers = None
    _watch(launchers)


def _watch(processes: list[int] | None) -> None:
    """Wait until one of the processes has died (None: one already has), then end this process."""
    if processes == []:
        return
    if processes:
        _wait(processes)
    with suppress(OSError):  # the reader of stderr may have died too
        print("what launched this process has died: ending", file=sys.stderr)
    # To the main thread, which runs the signal handlers and may be blocked.
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(processes: list[int]) -> None:
    """Return when one of the processes has died."""
    poll = select.poll()
    try:
        for process in processes:
            poll.register(os.pidfd_open(process), select.POLLIN)
        poll.poll()
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):
        # Linux before 5.3, some sandboxes, and Pythons built for them have no pidfd_open.
        while all(map(_alive, processes)):
            time.sleep(_LOOKS)


def _alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _launchers() -> list[int] | None:
    """Return the ids of the processes above this one (accelerate, a shell, DVC), up to one that no launcher started.

    Return None if one has died already and another process has adopted its child: DVC itself would be in the session
    of its stage.
    """
    found, process = [], os.getpid()
    while any(name.startswith(_MARKS) for name in _environment(process)):
        above = psutil.Process(process).ppid()
        if above == 0:  # the first process of a container, whose variables may have been set from outside
            break
        adopted = _DVC in _environment(process) and _DVC not in _environment(above)
        if adopted and os.getsid(above) != os.getsid(process):
            return None
        found.append(above)
        process = above
    return found


def _environment(process: int) -> dict[str, str]:
    """Return the environment variables that a process was started with; none if it is another user's."""
    try:
        return psutil.Process(process).environ()
    except psutil.AccessDenied:
        return {}
    except psutil.NoSuchProcess:
        try:
            os.kill(process, 0)
        except PermissionError:  # a machine may hide other users' processes (hidepid)
            return {}
        raise

"""A stage ends with what launched it. DVC and accelerate, when they are killed, leave behind what they started.

On Linux, where /proc is there; elsewhere nothing is watched.
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

# Set by a launcher for what it starts: by DVC, by accelerate, and by the torchrun inside accelerate.
_DVC = "DVC_STAGE"
_MARKS = (_DVC, "ACCELERATE_", "TORCHELASTIC_RUN_ID")
_WATCHED = sys.platform == "linux" and Path("/proc/self/stat").exists()
# Seconds from being told to end to being killed: enough for a checkpoint.
_GRACE = 120
# Seconds from one look to the next where the kernel does not tell of a death.
_LOOKS = 0.5


def end_with_launchers() -> None:
    """Have this process told to end (SIGTERM), and two minutes later killed, when a launcher above it has died."""
    if _WATCHED:
        threading.Thread(target=_watch_launchers, daemon=True).start()


def end_with(process: int) -> None:
    """The same, when the given process has died."""
    if _WATCHED:
        threading.Thread(target=_watch, args=([process],), daemon=True).start()


def _watch_launchers() -> None:
    try:
        launchers = _launchers()
    except (OSError, psutil.NoSuchProcess):  # one died as it was looked at
        launchers = None
    _watch(launchers)


def _watch(processes: list[int] | None) -> None:
    """Wait until one of the processes has died; None: one has."""
    if processes == []:
        return
    if processes:
        _wait(processes)
    with suppress(OSError):  # who read it may have died too
        print("what launched this process has died: ending", file=sys.stderr)
    # To the main thread, which runs the handlers, and may be waiting.
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
        # Linux before 5.3 and some sandboxes know of no such descriptors, nor do Pythons built for such.
        while all(map(_alive, processes)):
            time.sleep(_LOOKS)


def _alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _launchers() -> list[int] | None:
    """The processes above this one, up to the first that no launcher started: accelerate, a shell, DVC.

    None when one has died already, and its children have been adopted: DVC would be of its stage's session.
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
    """Return the variables that a process was started with; none where they are another user's."""
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

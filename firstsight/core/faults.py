"""One line for each fault of the machine: a full or read-only disk, memory that has run out, a killed worker."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firstsight.core.errors import UserError

# How Python and the libraries that write (safetensors, torch, pyarrow) report a full disk.
_FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)\b|PytorchStreamWriter failed")
_KILLED_WORKER = re.compile(r"DataLoader worker \(pid\S* [\d, ]+\) (is killed by signal: \w+|exited unexpectedly)")
# The file system of shared memory and locks, which may be small in a container.
_SHARED_MEMORY = Path("/dev/shm")
_READ_ONLY = re.compile(r"Read-only file system|os error 30\b")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Write `path` in the block. Raises UserError, naming the file system, when it is full or read-only."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if line := _unwritable(error, path):
            raise UserError(line) from error
        raise


def check_disk_space(place: Path, needed: int, remedy: str) -> None:
    """Raise UserError, ending with the remedy, when the file system of `place` has fewer than `needed` bytes free."""
    system = _file_system(place)
    free = shutil.disk_usage(system).free
    if needed > free:
        raise UserError(
            f"{place}: expected {needed / 1e6:,.1f} MB free on the file system {system}, found {free / 1e6:,.1f} MB; "
            f"{remedy}"
        )


def in_words(error: Exception) -> str | None:
    """Return one line for a fault of the machine that ended a stage; None for any other error."""
    text = str(error)
    if line := _unwritable(error, Path(getattr(error, "filename", None) or ".")):
        return line
    if isinstance(error, PermissionError):
        return (
            f"{error.filename}: expected permission to use it, found: {error.strerror}; ask its owner for it, or work "
            "elsewhere (in a clone of your own; FIRSTSIGHT_SCRATCH sets the folder of unfinished work)"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
        return "memory: expected enough for this stage, found it spent; lower the stage's batch_size, or free memory"
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which not every stage loads
        return "GPU memory: expected enough for this stage, found it spent; lower the stage's batch_size in params.yaml"
    if killed := _KILLED_WORKER.search(text):
        return (
            f"data worker: expected it to run to the end, found: {killed[0]} (out of memory?); lower "
            "runtime.data_workers and run the stage again, which continues from what it has saved"
        )
    return None


def _unwritable(error: BaseException | None, path: Path) -> str | None:
    """Return one line where the error, or one behind it, says that `path` cannot be written; else None."""
    while error is not None:
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(text):
            system = _file_system(path)
            if _spent(_SHARED_MEMORY) and not _spent(system):
                return (
                    f"{_SHARED_MEMORY}: expected room for what processes share, found it full; free some, enlarge it "
                    "(docker run --shm-size), or set runtime.data_workers: 0, and run it again: what is done is kept"
                )
            free = shutil.disk_usage(system).free / 1e6
            return (
                f"{path}: expected space on the file system {system}, found it full ({free:.1f} MB free); free some "
                "(dvc gc --workspace, make clean-scratch) and run the stage again; earlier outputs are unchanged"
            )
        if number == errno.EROFS or _READ_ONLY.search(text):
            return (
                f"{path}: expected a file system that can be written, found {_file_system(path)} read-only; mount it "
                "for writing, or work elsewhere (FIRSTSIGHT_SCRATCH sets the folder of unfinished work)"
            )
        error = error.__cause__ or error.__context__
    return None


def _spent(system: Path) -> bool:
    """Return whether a file system has less than one page (4,096 bytes) free."""
    return system.exists() and shutil.disk_usage(system).free < 4096


def _file_system(path: Path) -> Path:
    """Return where the file system is mounted that holds a path, or will hold it; links are followed."""
    place = path.resolve()
    while not (place.exists() and place.is_mount()) and place != place.parent:
        place = place.parent
    return place

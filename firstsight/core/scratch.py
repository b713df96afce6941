"""Folders for unfinished work of stages, outside their outputs, which DVC deletes before a rerun."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import fingerprint, fingerprint_files
from firstsight.core.stage import log

# Seconds to wait for another process that does the same work: it may have been told to end, and be saving.
_PATIENCE = 60


def root() -> Path:
    """Return the folder `$FIRSTSIGHT_SCRATCH`, or `.scratch/` of the main repository where that is not set.

    DVC runs queued experiments in a temporary copy and gives the path of the main repository in `DVC_ROOT`.
    """
    place = os.environ.get("FIRSTSIGHT_SCRATCH") or Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
    return Path(place).absolute()


@contextmanager
def kept_folder(stage: str, made_from: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder that keeps its files until the work is done: the same work, when restarted, gets it again.

    The folder is removed when the block ends without an exception.

    Args:
        made_from: everything that the work's result depends on, as JSON. Code and library versions are added to it.

    Raises:
        UserError: another process is doing this work, or the folder cannot be created.
    """
    key = fingerprint({"from": made_from, "code": _code()})[:16]
    folder = root() / f"{stage}-{key}"
    try:
        root().mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"{root()}: expected a folder that can be written, found: {error.strerror}; set FIRSTSIGHT_SCRATCH to one"
        ) from None
    with _alone(folder):
        _report_others(stage, folder)
        folder.mkdir(exist_ok=True)
        try:
            with writing(folder):
                yield folder
            shutil.rmtree(folder)
        finally:
            if not folder.exists() or not any(folder.iterdir()):
                shutil.rmtree(folder, ignore_errors=True)
                _lock(folder).unlink()


def clean() -> None:
    """Remove every folder that no process is using."""
    for folder in _folders(""):
        try:
            with FileLock(_lock(folder), timeout=0):
                shutil.rmtree(folder)
                _lock(folder).unlink()
        except Timeout:
            log.info("%s stays: a process is using it", folder)
        else:
            log.info("removed %s", folder)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises UserError when another process still holds it after a minute."""
    lock = FileLock(_lock(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is doing this work, in %s; waiting %d s for it to end", folder, _PATIENCE)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise UserError(
                f"{folder}: expected no other process at this work, found one; wait for it, or end it"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _report_others(stage: str, own: Path) -> None:
    """Log the size of other unfinished runs of the stage, which are of use only if their settings are used again."""
    others = [folder for folder in _folders(f"{stage}-") if folder != own]
    size = sum(map(_size, others))
    if others:
        log.info("%s keeps %d other unfinished runs, %.1f MB; make clean-scratch", root(), len(others), size / 1e6)


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files, without those that another process removes meanwhile."""
    size = 0
    for inner, _, names in os.walk(folder):  # rglob would raise where a folder has gone
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(inner, name).stat().st_size
    return size


def _folders(prefix: str) -> list[Path]:
    return [path for path in sorted(root().glob(f"{prefix}*")) if path.is_dir()]


def _code() -> dict[str, str]:
    """Return a fingerprint of this repository's loaded modules, and the versions of the libraries that compute."""
    here = Path(__file__).parents[2]
    loaded = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    ours = [file for file in loaded for folder in ("firstsight", "stages") if file.is_relative_to(here / folder)]
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    return {"files": fingerprint_files(sorted(ours)), **versions}

"""Folders for what a stage keeps while it works, outside its outputs: DVC deletes outputs before a rerun."""

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

# Seconds to wait for another process at the same work: for one that was told to end, and saves what it has.
_PATIENCE = 60


def root() -> Path:
    """`$FIRSTSIGHT_SCRATCH`, else `.scratch/` of the main repository.

    DVC runs queued experiments in a temporary copy, and says where the main repository is in `DVC_ROOT`.
    """
    place = os.environ.get("FIRSTSIGHT_SCRATCH") or Path(os.environ.get("DVC_ROOT", ".")) / ".scratch"
    return Path(place).absolute()


@contextmanager
def kept_folder(stage: str, made_from: dict[str, Any]) -> Iterator[Path]:
    """A folder that is there again, with what it held, when the same work is begun anew; gone when the block ends well.

    Args:
        made_from: all that the work's result depends on, as JSON. The code and the libraries are added to it.

    Raises:
        UserError: another process is at this work.
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
        _tell_of_others(stage, folder)
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
    """Remove every folder that no process is at work in."""
    for folder in _folders(""):
        try:
            with FileLock(_lock(folder), timeout=0):
                shutil.rmtree(folder)
                _lock(folder).unlink()
        except Timeout:
            log.info("%s stays: a process is at work in it", folder)
        else:
            log.info("removed %s", folder)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(_lock(folder))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is at this work, in %s; waiting %d s for it to end", folder, _PATIENCE)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise UserError(
                f"{folder}: expected to be alone at this work, found another process at it; wait for it, or end it"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _tell_of_others(stage: str, own: Path) -> None:
    """Say what is kept of other runs of the stage: large, and of use only if its settings come back."""
    others = [folder for folder in _folders(f"{stage}-") if folder != own]
    size = sum(map(_size, others))
    if others:
        log.info("%s keeps %d other unfinished runs, %.1f MB; make clean-scratch", root(), len(others), size / 1e6)


def _size(folder: Path) -> int:
    """Bytes of a folder's files, but for what a process at work in it removes meanwhile."""
    size = 0
    for inner, _, names in os.walk(folder):  # rglob would raise where a folder has gone
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(inner, name).stat().st_size
    return size


def _folders(prefix: str) -> list[Path]:
    return [path for path in sorted(root().glob(f"{prefix}*")) if path.is_dir()]


def _code() -> dict[str, str]:
    """Fingerprint of the modules of this repository that are loaded, and versions of what computes."""
    here = Path(__file__).parents[2]
    loaded = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    ours = [file for file in loaded for folder in ("firstsight", "stages") if file.is_relative_to(here / folder)]
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")}
    return {"files": fingerprint_files(sorted(ours)), **versions}

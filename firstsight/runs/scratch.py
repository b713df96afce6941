"""Folders for what a stage keeps while it works, outside its outputs: DVC deletes outputs before a rerun."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint, fingerprint_files


def root() -> Path:
    """`$FIRSTSIGHT_SCRATCH`, else `.scratch/` of the main repository.

    DVC runs queued experiments in a temporary copy, and says where the main repository is in `DVC_ROOT`.
    """
    return Path(os.environ.get("FIRSTSIGHT_SCRATCH") or Path(os.environ.get("DVC_ROOT", ".")) / ".scratch")


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
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: expected to be alone at this work, found another process at it; wait for it, or end it"
        ) from None
    try:
        yield folder
        shutil.rmtree(folder)
        Path(lock.lock_file).unlink()
    finally:
        lock.release()


def _code() -> dict[str, str]:
    """Fingerprint of the modules of this repository that are loaded, and versions of what computes."""
    here = Path(__file__).parents[2]
    loaded = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    ours = [file for file in loaded for folder in ("firstsight", "stages") if file.is_relative_to(here / folder)]
    versions = {name: version(name) for name in ("torch", "transformers")}
    return {"files": fingerprint_files(sorted(ours)), **versions}

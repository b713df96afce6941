"""Write outputs that appear whole or not at all, and fingerprint files, folders and JSON values."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from firstsight.core.errors import UserError
from firstsight.core.faults import writing


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to write into. It replaces `path` when the block ends, and is removed when the block raises.

    The folder is created next to `path`, on the same file system, so that it can be renamed; an earlier `path` is
    removed only then. Folders that killed processes have left there are removed first.
    """
    path = path.resolve()  # an output may be a link to a folder on a larger disk
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(BlockingIOError), _locked(abandoned):
            shutil.rmtree(abandoned, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with _locked(partial), writing(partial):
            yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Raises BlockingIOError when another process holds the lock."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        if not lock_descriptor(opened, blocking=False):
            raise BlockingIOError
        yield
    finally:
        os.close(opened)


def link_folder(source: Path, target: Path) -> None:
    """Make the files of `source` appear in the folder `target`, as `link_file` does."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir()
        else:
            link_file(path, place)


def link_file(path: Path, place: Path) -> None:
    """Make the file `path` appear at `place`: as a hard link, if possible, for weights; as a copy for other files.

    Libraries overwrite configs and tokenizers in place; through a link they would change DVC's or the hub's cache.
    """
    if path.name.endswith((".safetensors", ".onnx.data")):
        with suppress(OSError):
            os.link(path.resolve(), place)
            return
    shutil.copyfile(path, place)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. Raises ValueError for NaN and infinity, which standard JSON does not have.

    The file is replaced, not overwritten, because it may be a hard link to a user's file or to DVC's cache.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_json(path: Path, made_by: str) -> Any:
    """Return the JSON in `path`. Raises UserError, naming the stage that writes it, when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON written by {made_by}, found {error}; run {made_by} again") from None


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON value, keys sorted: equal values have equal fingerprints in any process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint_files(paths: list[Path]) -> str:
    """Return the SHA-256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """Return the SHA-256 over the contents of all files of a folder, in the order of their paths."""
    return fingerprint_files(sorted(path for path in folder.rglob("*") if path.is_file()))

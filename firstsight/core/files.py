"""Outputs that appear whole or not at all, and fingerprints of what went into them."""

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
    """A folder to write into, which takes the place of `path` when the block ends, or vanishes when it raises.

    It is made beside `path`, on the same file system, so that taking its place is a rename. An earlier `path` is
    removed only then. What a killed process has left of such a folder is removed first.
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
    """The folder as a living process's own. Raises BlockingIOError when it is another's."""
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
    """Make the file `path` appear at `place`: tensors as a hard link where one can be made, anything else as a copy.

    Libraries write configs and tokenizers in place; through a link they would write into DVC's or the hub's cache.
    """
    if path.suffix == ".safetensors":
        with suppress(OSError):
            os.link(path.resolve(), place)
            return
    shutil.copyfile(path, place)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN and infinity are refused, because other readers of JSON refuse them.

    The file is replaced, never written into: it may be a hard link to a user's file or to DVC's cache.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_json(path: Path, made_by: str) -> Any:
    """The JSON in `path`. Raises UserError, naming the stage that makes it, when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected JSON written by {made_by}, found {error}; run {made_by} again") from None


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value with sorted keys: equal values, equal fingerprints, in any process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint_files(paths: list[Path]) -> str:
    """SHA-256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over the contents of all files of a folder, in the order of their paths."""
    return fingerprint_files(sorted(path for path in folder.rglob("*") if path.is_file()))

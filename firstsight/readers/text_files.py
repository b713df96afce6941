"""Files of annotations as text, JSON and parquet, read whole: the largest in use have tens of megabytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError


def media_root(data: Data) -> Path:
    """The folder that media are looked for in."""
    return Path(data.media_root) if data.media_root else Path(data.path).parent


def read_text(path: Path, what: str) -> str:
    """
    Raises:
        UserError: the file is missing, or no UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.path: expected {what} in UTF-8, found {path} ({error}); "
            "save it as UTF-8 (from a spreadsheet: as CSV UTF-8), or correct the path"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: expected {what} in UTF-8, found {path} ({error}); correct the path") from None
    if not text.strip():
        raise UserError(f"{path}: expected {what}, found an empty file; data.path names another?")
    return text


def read_json(path: Path, what: str) -> Any:
    """
    Raises:
        UserError: the file is missing, or no JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected {what}, found {str(error)[:120]}; correct it") from None


def read_records(path: Path, what: str, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Place and content of each record in a JSON list, JSON Lines, or (by its suffix) parquet file; see `as_object`.

    Args:
        key: the list is the value of this key of a JSON object.

    Raises:
        UserError: the file is missing, or holds something else.
    """
    if path.suffix.lower() == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: expected {what}, found {str(error).splitlines()[0][:120]}; correct it") from None
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
    elif key is None and not read_text(path, what).lstrip().startswith("["):
        yield from ((f"{path}: line {number}", text) for number, text in read_lines(path, what))
    else:
        found = read_json(path, what)
        if key is not None:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, list):
            where = f" under {key!r}" if key else ""
            raise UserError(f"{path}: expected {what}, found no list{where}; data.path names another file?")
        yield from ((f"{path}: record {number}", record) for number, record in enumerate(found, start=1))


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank. Lines end at \\n alone: JSON allows other separators in text."""
    for number, text in enumerate(read_text(path, what).split("\n"), start=1):
        if text.strip():
            yield number, text


def as_object(record: Any) -> dict[str, Any]:
    """What `read_records` gives, or the JSON in a line, as a dictionary.

    Raises:
        BadRecordError: it is none.
    """
    found, error = record, ""
    if isinstance(record, str):
        try:
            found = json.loads(record, parse_constant=_refuse)
        except (ValueError, RecursionError) as raised:
            error = f" ({str(raised)[:80]})"
    if not isinstance(found, dict):
        remedy = "write one object a line" if isinstance(record, str) else "correct it"
        raise BadRecordError(f"expected a JSON object, found {str(record)[:60]!r}{error}; {remedy}")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")

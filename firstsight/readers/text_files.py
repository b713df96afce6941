"""Read annotation files (text, JSON, parquet) whole: the largest in use have tens of megabytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError, reason


def media_root(data: Data) -> Path:
    """Return the folder of images and videos: `data.media_root`, or by default the folder of `data.path`."""
    return Path(data.media_root) if data.media_root else Path(data.path).parent


def read_text(path: Path, what: str) -> str:
    """Return the text of a file, which errors call `what`.

    Raises:
        UserError: the file is missing, not UTF-8 or empty.
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
        raise UserError(f"{path}: expected {what}, found an empty file; correct data.path, or fill the file")
    return text


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file, which errors call `what`.

    Raises:
        UserError: the file is missing or not JSON.
    """
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected {what}, found {str(error)[:120]}; correct it") from None


def read_records(path: Path, what: str, key: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield place and content of each record of a JSON list, JSON Lines or (by its suffix) parquet file.

    The content of a line is its text: see `as_object`.

    Args:
        what: what errors call the file.
        key: the list is the value of this key of a JSON object; None: the file is the list.

    Raises:
        UserError: the file is missing or has another content.
    """
    if path.suffix.lower() == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except Exception as error:  # over a damaged file, pyarrow raises anything
            raise UserError(f"{path}: expected {what}, found {reason(error)[:120]}; correct it") from None
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))
    elif key is None and not read_text(path, what).lstrip().startswith("["):
        yield from ((f"{path}: line {number}", text) for number, text in read_lines(path, what))
    else:
        found = read_json(path, what)
        if key is not None:
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, list):
            where = f" under {key!r}" if key else ""
            raise UserError(f"{path}: expected {what}, found no list{where}; correct data.path")
        yield from ((f"{path}: record {number}", record) for number, record in enumerate(found, start=1))


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each nonblank line. Only \\n ends a line: JSON strings may hold other separators."""
    for number, text in enumerate(read_text(path, what).split("\n"), start=1):
        if text.strip():
            yield number, text


def as_object(record: Any) -> dict[str, Any]:
    """Return a record of `read_records` as a dictionary, parsing it if it is the text of a line.

    Raises:
        BadRecordError: the record is not a JSON object.
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
    raise ValueError(f"{constant} is not JSON")

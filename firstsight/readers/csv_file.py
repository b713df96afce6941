"""Read records from a CSV file (RFC 4180, UTF-8): one question or text a row, the keys of `jsonl` as columns.

    media,question,answer
    clips/kitchen.mp4,What do I hold?,a cup

Several options, accepted answers or frames share one cell, separated by `|`. An empty cell means that the value is
absent.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.columns import columns_of, keys
from firstsight.readers.jsonl import asked
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked
from firstsight.readers.text_files import read_text

LISTS = ("options", "answers")
NUMBERS = ("start", "end")


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the rows.

    Raises:
        UserError: the file is missing or not UTF-8; a column is unknown or there twice, or one is missing: `question`
            or `text`, `class` where there are classes, or one that `data.prompt` names; or an unclosed quote joins
            several rows into one.
    """
    path = Path(data.path)
    # csv, not pandas: pandas pads short rows, shifts long ones, accepts stray quotes and gives no line numbers.
    # Strict: a stray quote raises an error, where it would otherwise join the rows after it.
    rows = csv.reader(io.StringIO(read_text(path, "a CSV file")), strict=True)
    columns = _header(path, rows, data)
    while True:
        line = rows.line_num + 1
        place = f"{path}: line {line}"
        with problems.at(place):
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > line:
                    # Even if data.on_error is skip: which rows the quote has joined is unknown.
                    raise UserError(
                        f"{place}: expected a row of CSV, found {error}, reading up to line {rows.line_num}; "
                        "close the quote, or double it"
                    ) from None
                raise BadRecordError(
                    f"expected a row of CSV, found {error}; quote the cell, and double its quotes"
                ) from None
            if any(cell.strip() for cell in cells):
                yield asked(place, _values(columns, cells, data), f"{path.stem}-{line}", data)


def _header(path: Path, rows: Iterator[list[str]], data: Data) -> list[str]:
    try:
        columns = [name.strip() for name in next(rows, [])]
    except csv.Error as error:
        raise UserError(f"{path}: line 1: expected the columns' names, found {error}; correct it") from None
    for name in filter(None, columns):  # spreadsheets export empty columns without a name
        if name not in keys(data) and data.prompt is None:
            classes = "" if data.classes else " (and 'class', where data.classes names the classes)"
            raise UserError(
                f"{path}: line 1: expected columns of {sorted(keys(data))}{classes} with commas between them, found "
                f"{name[:60]!r}; rename or remove it"
            )
        if columns.count(name) > 1:
            raise UserError(f"{path}: line 1: expected each column once, found {name!r} again; remove one")
    needed = [*columns_of(data), *(["class"] if data.classes else [])]
    if needed == ["question"] and "text" in columns:
        needed = []
    if missing := [name for name in needed if name not in columns]:
        asked = "'question' or 'text'" if needed == ["question"] else repr(missing[0])
        remedy = "add it" if data.prompt is None else "add it, or correct data.prompt"
        raise UserError(f"{path}: line 1: expected a column {asked}, found {columns}; {remedy}")
    return columns


def _values(columns: list[str], cells: list[str], data: Data) -> dict[str, Any]:
    if len(cells) != len(columns):
        raise BadRecordError(f"expected {len(columns)} cells, found {len(cells)}; quote cells that hold commas")
    given = {name: cell for name, cell in zip(columns, cells, strict=True) if cell.strip()}
    if "" in given:
        raise BadRecordError(
            f"expected a name in line 1 for the column of {given[''][:60]!r}, found none; name it, or empty the cell"
        )
    # What the template names has no other form than its text.
    named = dict.fromkeys(columns_of(data) if data.prompt else (), "")
    return named | {name: cell if name in named else _value(name, cell) for name, cell in given.items()}


def _value(name: str, cell: str) -> Any:
    if name in NUMBERS:
        try:
            return float(cell)
        except ValueError:
            raise BadRecordError(f"{name}: expected seconds, found {cell[:60]!r}; correct it") from None
    if name in LISTS or (name == "media" and "|" in cell):
        return [part.strip() for part in cell.split("|")]
    return cell.strip() if name == "media" else cell

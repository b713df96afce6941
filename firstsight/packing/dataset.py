"""A split as a torch dataset of packed samples, with what is known of the teacher beside them where there is one."""

from collections.abc import Sequence
from copy import copy
from itertools import accumulate, zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from firstsight.core.errors import UserError
from firstsight.packing.pack import IGNORE, Encoded, collate, encode, pack
from firstsight.records.parquet import AnsweredSplit, Split
from firstsight.records.sample import Sample


class TeacherSource(Protocol):
    """Where a dataset gets what the loss needs of the teacher: its cached targets, or its own view of the sample."""

    def answers(self, sample: Sample, records: range) -> list[list[int]]:
        """The teacher's answer tokens for the records, with these running numbers, of a sample."""

    def of(self, sample: Sample, records: range) -> dict[str, Tensor]:
        """What the loss needs of the teacher for the records of a sample: tensors by name."""

    def blank(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a sample none of whose answers count."""

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of several samples as a batch."""


class OnlineTeacher:
    """The samples of one split packed a second time, by the processor of a teacher that runs beside the student."""

    def __init__(self, processor: Any):
        self.processor = processor
        self._encoded: dict[int, Encoded] = {}

    def answers(self, sample: Sample, records: range) -> list[list[int]]:
        return self._encode(sample, records).answers()

    def of(self, sample: Sample, records: range) -> dict[str, Tensor]:
        return pack(self.processor, sample, self._encode(sample, records))

    def blank(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"labels": torch.full_like(tensors["labels"], IGNORE)}

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return collate(features, self.processor.tokenizer.pad_token_id)

    def _encode(self, sample: Sample, records: range) -> Encoded:
        if records.start not in self._encoded:
            self._encoded[records.start] = encode(self.processor, sample, sample.records)
        return self._encoded[records.start]


class PackedDataset(Dataset):
    """Sample i of the split, packed; with a teacher, also what is known of it under `teacher`.

    It may be lengthened by samples none of whose answers count, so that processes get equal shares
    (`padded_to_multiple`).
    """

    def __init__(self, split: Split | AnsweredSplit, processor: Any, teacher: TeacherSource | None = None):
        self.split, self.processor, self.teacher = split, processor, teacher
        self._length = len(split)
        # Text is encoded once; media, which is large, is processed anew each time.
        self._encoded: dict[int, Encoded] = {}
        # Number of the first record of every sample.
        self._first_record = [0, *accumulate(split.record_counts())]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.split):
            return self._blank(self[index % len(self.split)])
        sample = self.split[index]
        features: dict[str, Any] = pack(self.processor, sample, self._encode(index))
        if self.teacher is not None:
            features["teacher"] = self.teacher.of(sample, self._records(index))
        return features

    def padded_to_multiple(self, of: int) -> "PackedDataset":
        """The same dataset, of a length that is a multiple of `of`."""
        padded = copy(self)
        padded._length += -len(self.split) % of
        return padded

    def answer_tokens(self) -> int:
        """How many answer tokens the split has."""
        return sum(len(answer) for index in range(len(self.split)) for answer in self._encode(index).answers())

    def check_answers(self) -> None:
        """Raises UserError, naming the first difference, unless the teacher's answer tokens are the student's."""
        for index in range(len(self.split)):
            sample = self.split[index]
            theirs = self.teacher.answers(sample, self._records(index))
            for record, mine, teachers in zip(sample.records, self._encode(index).answers(), theirs, strict=True):
                for position, (expected, found) in enumerate(zip_longest(teachers, mine)):
                    if expected != found:
                        raise UserError(
                            f"{self.split.path}: record {record.id}: expected the teacher's answer tokens, where "
                            f"token {position} is {self._name(expected)}, found {self._name(found)} in the student's; "
                            "they must share a tokenizer"
                        )

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `firstsight.packing.pack.collate`, and the teacher's under `teacher`."""
        own = [{name: value for name, value in feature.items() if name != "teacher"} for feature in features]
        batch: dict[str, Any] = collate(own, self.processor.tokenizer.pad_token_id)
        if self.teacher is not None:
            batch["teacher"] = self.teacher.collate([feature["teacher"] for feature in features])
        return batch

    def _encode(self, index: int) -> Encoded:
        if index not in self._encoded:
            sample = self.split[index]
            self._encoded[index] = encode(self.processor, sample, sample.records)
        return self._encoded[index]

    def _records(self, index: int) -> range:
        return range(self._first_record[index], self._first_record[index + 1])

    def _blank(self, features: dict[str, Any]) -> dict[str, Any]:
        blank = features | {"labels": torch.full_like(features["labels"], IGNORE)}
        return blank | {"teacher": self.teacher.blank(features["teacher"])} if self.teacher else blank

    def _name(self, token: int | None) -> str:
        """A token id as a person reads it; None is the end."""
        if token is None:
            return "the end"
        return f"{token} ({self.processor.tokenizer.convert_ids_to_tokens(token)!r})"

"""A split as a torch dataset of packed samples, with what is known of the teacher beside them where there is one."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Dataset

from firstsight.core.errors import UserError
from firstsight.data.packing import Encoded, collate, encode, pack
from firstsight.data.records import Sample, Split


class TeacherSource(Protocol):
    """Where a dataset gets what the loss needs of the teacher: its cached targets, or its own view of the sample."""

    def of(self, sample: Sample, records: range) -> tuple[list[list[int]], dict[str, Tensor]]:
        """For the sample whose records have these running numbers: the teacher's answer tokens, and tensors by name."""

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of several samples as a batch."""


class OnlineTeacher:
    """The samples of one split packed a second time, by the processor of a teacher that runs beside the student."""

    def __init__(self, processor: Any):
        self.processor = processor
        self._encoded: dict[int, Encoded] = {}

    def of(self, sample: Sample, records: range) -> tuple[list[list[int]], dict[str, Tensor]]:
        if records.start not in self._encoded:
            self._encoded[records.start] = encode(self.processor, sample, sample.records)
        encoded = self._encoded[records.start]
        return encoded.answers(), pack(self.processor, sample, encoded)

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return collate(features, self.processor.tokenizer.pad_token_id)


class PackedDataset(Dataset):
    """Sample i of the split, packed; with a teacher, also what is known of it under `teacher`.

    Raises:
        UserError: on reading a sample, when the student's answer tokens are not the teacher's; names the first.
    """

    def __init__(self, split: Split, processor: Any, teacher: TeacherSource | None = None):
        self.split, self.processor, self.teacher = split, processor, teacher
        # Text is encoded once; media, which is large, is processed anew each time.
        self._encoded: dict[int, Encoded] = {}
        # Number of the first record of every sample.
        self._first_record = [0, *accumulate(split.record_counts())]

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.split[index]
        encoded = self._encode(index, sample)
        features: dict[str, Any] = pack(self.processor, sample, encoded)
        if self.teacher is not None:
            numbers = range(self._first_record[index], self._first_record[index + 1])
            answers, features["teacher"] = self.teacher.of(sample, numbers)
            self._check_answers(sample, encoded.answers(), answers)
        return features

    def answer_tokens(self) -> int:
        """How many answer tokens the split has."""
        return sum(
            len(answer) for index in range(len(self)) for answer in self._encode(index, self.split[index]).answers()
        )

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch: `firstsight.data.packing.collate`, and the teacher's under `teacher`."""
        own = [{name: value for name, value in feature.items() if name != "teacher"} for feature in features]
        batch: dict[str, Any] = collate(own, self.processor.tokenizer.pad_token_id)
        if self.teacher is not None:
            batch["teacher"] = self.teacher.collate([feature["teacher"] for feature in features])
        return batch

    def _encode(self, index: int, sample: Sample) -> Encoded:
        if index not in self._encoded:
            self._encoded[index] = encode(self.processor, sample, sample.records)
        return self._encoded[index]

    def _check_answers(self, sample: Sample, ours: list[list[int]], theirs: list[list[int]]) -> None:
        for record, mine, teachers in zip(sample.records, ours, theirs, strict=True):
            for position in range(max(len(mine), len(teachers))):
                expected, found = (ids[position] if position < len(ids) else None for ids in (teachers, mine))
                if expected != found:
                    raise UserError(
                        f"{self.split.path}: record {record.id}: expected the teacher's answer tokens, where token "
                        f"{position} is {expected}, found {found} in the student's; they must share a tokenizer"
                    )

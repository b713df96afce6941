"""A split as a torch dataset of packed samples, with the teacher's targets beside them where there are any."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from firstsight.core.errors import UserError
from firstsight.data.packing import IGNORE, Encoded, collate, encode, pack
from firstsight.data.records import Split


class Targets(Protocol):
    """What the dataset asks of a teacher's targets, by the running number of a record in its split."""

    def __len__(self) -> int: ...
    def answers(self, record: int) -> Tensor: ...
    def hidden(self, record: int) -> Tensor: ...


class PackedDataset(Dataset):
    """Sample i of the split, packed; with `targets`, also `teacher_hidden` [n, H] at its n answer tokens.

    Raises:
        UserError: on reading a sample, when the student's answer tokens are not the teacher's; names the first.
    """

    def __init__(self, split: Split, processor: Any, targets: Targets | None = None):
        self.split, self.processor, self.targets = split, processor, targets
        # Text is encoded once; media, which is large, is processed anew each time.
        self._encoded: dict[int, Encoded] = {}
        # Number of the first record of every sample.
        self.first_record = [0, *accumulate(split.record_counts())]
        if targets is not None and len(targets) != self.first_record[-1]:
            raise UserError(
                f"{split.path}: expected {self.first_record[-1]} records in the teacher's targets, "
                f"found {len(targets)}; run cache-teacher-targets again"
            )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.split[index]
        if index not in self._encoded:
            self._encoded[index] = encode(self.processor, sample, sample.records)
        features = pack(self.processor, sample, self._encoded[index])
        if self.targets is not None:
            numbers = range(self.first_record[index], self.first_record[index + 1])
            self._check_answers(features, sample.records, numbers)
            features["teacher_hidden"] = torch.cat([self.targets.hidden(number) for number in numbers])
        return features

    def _check_answers(self, features: dict[str, Tensor], records: Sequence[Any], numbers: range) -> None:
        own = features["labels"][features["labels"] != IGNORE]
        teacher = torch.cat([self.targets.answers(number) for number in numbers])
        if torch.equal(own, teacher):
            return
        for place, (record, number) in enumerate(zip(records, numbers, strict=True), start=1):
            mine = features["labels"][(features["segment_ids"] == place) & (features["labels"] != IGNORE)].tolist()
            theirs = self.targets.answers(number).tolist()
            for position in range(max(len(mine), len(theirs))):
                pair = [ids[position] if position < len(ids) else None for ids in (theirs, mine)]
                if pair[0] != pair[1]:
                    raise UserError(
                        f"{self.split.path}: record {record.id}: expected the teacher's answer tokens, where token "
                        f"{position} is {pair[0]}, found {pair[1]} in the student's; they must share a tokenizer"
                    )

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch: `firstsight.data.packing.collate`."""
        return collate(features, self.processor.tokenizer.pad_token_id)

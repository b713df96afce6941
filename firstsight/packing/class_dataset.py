"""A split whose records have a class, as a torch dataset: each prompt with the wording of every class behind it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from firstsight.packing.dataset import PackedDataset
from firstsight.packing.pack import IGNORE
from firstsight.records.sample import Record, Sample


class ClassDataset(PackedDataset):
    """Pack sample i of a split to score the split's C classes: the wording of each is a branch behind the prompt.

    The `labels` [R] of a sample of R records are the numbers of their classes, `IGNORE` where a record has no answer;
    `token_labels` [S] are the tokens of the wordings, C branches for each record, in the order of the classes.
    """

    def answers(self, index: int) -> list[list[int]]:
        """Return the class number of each record of a sample, in a list of its own; `IGNORE` without an answer."""
        return [[self._number(record)] for record in self.split[index].records]

    def _number(self, record: Record) -> int:
        return self.split.classes.index(record.answer) if record.answer else IGNORE

    def _encode(self, sample: Sample, place: int) -> dict[str, Tensor]:
        asked = tuple(replace(record, answer=name) for record in sample.records for name in self.split.classes)
        packed = super()._encode(replace(sample, records=asked), place)
        return packed | {
            "labels": torch.tensor([self._number(record) for record in sample.records]),
            "token_labels": packed["labels"],
        }

    def _without_answers(self, features: dict[str, Any]) -> dict[str, Any]:
        nothing = torch.full_like(features["token_labels"], IGNORE)
        return super()._without_answers(features) | {"token_labels": nothing}

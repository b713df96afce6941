"""A split as a torch dataset of packed samples, each with the teacher's targets or inputs where there is a teacher.

To score classes, the wordings of all of them are packed behind each prompt.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import accumulate, chain, zip_longest
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, get_worker_info

from firstsight.core.errors import UserError
from firstsight.models.text_processor import EncoderProcessor
from firstsight.packing.pack import (
    IGNORE,
    Encoded,
    collate,
    encode,
    encode_answers,
    encode_questions,
    expand,
    lay_out,
    pack,
)
from firstsight.records.parquet import AnsweredSplit, Split
from firstsight.records.sample import Record, Sample

# Packed samples that are kept in memory, for a later epoch, or where samples are repeated.
_KEPT_BYTES = 1 << 30


class TeacherSource(Protocol):
    """Provide what the loss needs of the teacher: its cached targets (`SplitTargets`), or its inputs (`OnlineTeacher`).

    `records` are the numbers of a sample's records in the split.
    """

    def answers(self, sample: Sample, records: range) -> list[list[int]]:
        """Return the answer tokens of each record, as the teacher's tokenizer encodes them."""

    def features(self, sample: Sample, records: range) -> dict[str, Tensor]:
        """Return the sample's targets or inputs, by name."""

    def without_answers(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the features of the same sample with no answer tokens to learn from."""

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the features of several samples into a batch."""


class VisualSource(Protocol):
    """Provide what the vision tower and the processor made of a split's images and videos (`SplitVisualTokens`).

    `place` is a sample's row in the split's file.
    """

    def expanded(self, place: int) -> dict[str, Tensor]:
        """Return what `firstsight.packing.pack.expand` returned for all records of a sample, without its pixels."""

    def tokens(self, place: int) -> dict[str, Tensor]:
        """Return a sample's visual tokens [n, H] under the key "visual_tokens"; nothing without images and videos."""


class OnlineTeacher:
    """Pack the samples of one split a second time, with the processor of a teacher that runs during training."""

    def __init__(self, processor: Any):
        self.processor = processor
        self._encoded: dict[int, Encoded] = {}

    def answers(self, sample: Sample, records: range) -> list[list[int]]:
        return encode_answers(self.processor, sample.records)

    def features(self, sample: Sample, records: range) -> dict[str, Tensor]:
        return pack(self.processor, sample, self._encode(sample, records))

    def without_answers(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return features | {"labels": torch.full_like(features["labels"], IGNORE)}

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return collate(features, self.processor.tokenizer.pad_token_id)

    def _encode(self, sample: Sample, records: range) -> Encoded:
        if records.start not in self._encoded:
            self._encoded[records.start] = encode(self.processor, sample, sample.records)
        return self._encoded[records.start]


class ExpandedDataset(Dataset):
    """Run the processor over sample i of a split, for all its records, as `firstsight.packing.pack.expand` does."""

    def __init__(self, split: Split, processor: Any):
        self._split, self._processor = split, processor

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self._split[index]
        return expand(self._processor, sample, encode_questions(self._processor, sample, sample.records))


class PackedDataset(Dataset):
    """Pack sample i of a split; with a teacher, add the teacher's features under the key "teacher".

    With a `visual` source, samples have their visual tokens, and no pixels, which are not processed at all.
    `padded_to_multiple` lengthens the dataset by samples without answer tokens, so that processes get equal shares.
    """

    def __init__(
        self,
        split: Split | AnsweredSplit,
        processor: Any,
        teacher: TeacherSource | None = None,
        visual: VisualSource | None = None,
    ):
        self.split, self.processor, self.teacher, self.visual = split, processor, teacher, visual
        self._length = len(split)
        # By place in the split's file, so that a sample that is repeated is packed once.
        self._packed: dict[int, dict[str, Tensor]] = {}
        self._kept_bytes = 0
        # The number, in the split, of each sample's first record.
        self._first_record = [0, *accumulate(split.record_counts())]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.split):
            return self._without_answers(self[index % len(self.split)])
        features: dict[str, Any] = dict(self._pack(index))
        if self.visual is not None:
            features |= self.visual.tokens(self.split.place(index))
        if self.teacher is not None:
            features["teacher"] = self.teacher.features(self.split[index], self.records(index))
        return features

    def padded_to_multiple(self, of: int) -> "PackedDataset":
        """Return the same dataset, lengthened to a multiple of `of` by samples without answer tokens."""
        padded = copy(self)
        padded._length += -len(self.split) % of
        return padded

    def answers(self, index: int) -> list[list[int]]:
        """Return the answer tokens of each record of a sample, end of turn included."""
        return encode_answers(self.processor, self.split[index].records)

    def records(self, index: int) -> range:
        """Return the numbers, in the split, of a sample's records."""
        return range(self._first_record[index], self._first_record[index + 1])

    def check_answers(self) -> None:
        """Raise UserError, naming the first difference, unless both tokenizers encode every answer alike.

        The last token is left out: each model ends an answer with its own.
        """
        for index in range(len(self.split)):
            sample = self.split[index]
            teacher_answers = self.teacher.answers(sample, self.records(index))
            student_answers = encode_answers(self.processor, sample.records)
            for record, teacher, student in zip(sample.records, teacher_answers, student_answers, strict=True):
                for position, (expected, found) in enumerate(zip_longest(teacher[:-1], student[:-1])):
                    if expected != found:
                        raise UserError(
                            f"{self.split.path}: record {record.id}: expected the teacher's answer tokens, where "
                            f"token {position} is {self._token_text(expected)}, "
                            f"found {self._token_text(found)} in the student's; "
                            "they must share a tokenizer"
                        )

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join samples into a batch by `firstsight.packing.pack.collate`; the teacher's batch is under "teacher"."""
        student = [{name: value for name, value in feature.items() if name != "teacher"} for feature in features]
        batch: dict[str, Any] = collate(student, self.processor.tokenizer.pad_token_id)
        if self.teacher is not None:
            batch["teacher"] = self.teacher.collate([feature["teacher"] for feature in features])
        return batch

    def _pack(self, index: int) -> dict[str, Tensor]:
        place = self.split.place(index)
        if place in self._packed:
            return self._packed[place]
        packed = self._encode(self.split[index], place)
        size = sum(tensor.nbytes for tensor in packed.values())
        # Not in the worker processes of a data loader, each of which would keep its own, until the epoch ends.
        if self._kept_bytes + size <= _KEPT_BYTES and get_worker_info() is None:
            self._packed[place] = packed
            self._kept_bytes += size
        return packed

    def _encode(self, sample: Sample, place: int) -> dict[str, Tensor]:
        """Encode and pack a sample, which is at `place` in the split's file."""
        encoded = encode(self.processor, sample, sample.records)
        if self.visual is None:
            return pack(self.processor, sample, encoded)
        return lay_out(encoded, self.visual.expanded(place))

    def _without_answers(self, features: dict[str, Any]) -> dict[str, Any]:
        masked = features | {"labels": torch.full_like(features["labels"], IGNORE)}
        return masked | {"teacher": self.teacher.without_answers(features["teacher"])} if self.teacher else masked

    def _token_text(self, token: int | None) -> str:
        """Return a token id with its text; None is the end of an answer."""
        if token is None:
            return "the end"
        return f"{token} ({self.processor.tokenizer.convert_ids_to_tokens(token)!r})"


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
        packed = super()._encode(with_wordings(sample, sample.records, self.split.classes), place)
        return packed | {
            "labels": torch.tensor([self._number(record) for record in sample.records]),
            "token_labels": packed["labels"],
        }

    def _without_answers(self, features: dict[str, Any]) -> dict[str, Any]:
        nothing = torch.full_like(features["token_labels"], IGNORE)
        return super()._without_answers(features) | {"token_labels": nothing}


class EncoderDataset(ClassDataset):
    """Encode the prompts of sample i of a split for an encoder, which has C logits for each: one for each class.

    A sample has its `labels` [R] as in `ClassDataset`, the tokens of its prompts one after the other, and the number of
    tokens of each. `scored` says which prompts count.
    """

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join samples into a batch of their n prompts, as `encoder_batch` does."""
        names = ("labels", "tokens", "lengths", "scored")
        joined = {name: torch.cat([one[name] for one in features]) for name in names}
        prompts = joined["tokens"].split(joined["lengths"].tolist())
        batch = _padded(self.processor, prompts) | {"labels": joined["labels"], "scored": joined["scored"]}
        if self.teacher is not None:
            batch["teacher"] = self.teacher.collate([feature["teacher"] for feature in features])
        return batch

    def _encode(self, sample: Sample, place: int) -> dict[str, Tensor]:
        prompts = self.processor.encode([record.prompt() for record in sample.records])
        return {
            "labels": torch.tensor([self._number(record) for record in sample.records]),
            "tokens": torch.tensor(list(chain(*prompts))),
            "lengths": torch.tensor(list(map(len, prompts))),
            "scored": torch.ones(len(prompts), dtype=torch.bool),
        }

    def _without_answers(self, features: dict[str, Any]) -> dict[str, Any]:
        nothing = torch.zeros_like(features["scored"])
        return PackedDataset._without_answers(self, features) | {"scored": nothing}


def dataset_class(processor: Any, *, over_classes: bool) -> type[PackedDataset]:
    """Return the dataset that a model with this processor is trained on, by tokens or by classes."""
    if isinstance(processor, EncoderProcessor):
        return EncoderDataset
    return ClassDataset if over_classes else PackedDataset


def with_wordings(sample: Sample, records: Sequence[Record], classes: Sequence[str]) -> Sample:
    """Return the sample with each of the `records` once for each class, whose wording is its answer."""
    asked = tuple(replace(record, answer=name) for record in records for name in classes)
    return replace(sample, records=asked)


def class_batch(
    processor: Any, questions: Sequence[tuple[Sample, Record]], classes: Sequence[str]
) -> dict[str, Tensor]:
    """Pack questions, each in a sequence of its own, as a batch whose classes `class_scores` scores."""
    if isinstance(processor, EncoderProcessor):
        return encoder_batch(processor, [record.prompt() for _, record in questions])
    samples = [with_wordings(sample, [record], classes) for sample, record in questions]
    packed = [pack(processor, sample, encode(processor, sample, sample.records)) for sample in samples]
    return collate([one | {"token_labels": one["labels"]} for one in packed], processor.tokenizer.pad_token_id)


def encoder_batch(processor: EncoderProcessor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Encode n prompts for an encoder: `input_ids` and `attention_mask` [n, S], and `scored` [n], which are all."""
    ids = [torch.tensor(one) for one in processor.encode(list(prompts))]
    return _padded(processor, ids) | {"scored": torch.ones(len(ids), dtype=torch.bool)}


def _padded(processor: EncoderProcessor, prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    fill = processor.tokenizer.pad_token_id
    return {
        "input_ids": pad_sequence(list(prompts), batch_first=True, padding_value=fill),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in prompts], batch_first=True),
    }

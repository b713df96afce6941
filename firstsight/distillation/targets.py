"""Store the teacher's targets for every answer token on disk: computed once, read by every distillation.

The folder holds

    answers.json                 the teacher's answers, by record id, to questions that have none in the data
    index.json                   the kind of targets and, as fingerprints, what they were made from
    head.safetensors             the teacher's output head over the shared vocabulary [V, H]; for `hidden`
    {split}-00000.safetensors    shards of a split, each readable alone: n answer tokens of r records

A shard holds `answers` [n] int32, the answer tokens; `lengths` [r] int32, their number in each record; and a row per
token: for `hidden`, `hidden` [n, H], the final hidden states that predict the tokens, in the teacher's dtype, so that
the loss equals that of a teacher run in training, for any temperature, alpha and divergence; for `topk`, `ids` [n, k]
int32, `best` [n, k] and `logsumexp` [n] (`firstsight.loss.teachers`). For `online` there are no shards. Of targets over
C classes (`firstsight.distillation.builder`), a record counts as one token, which is the number of its class:
`hidden` [r, C] are the teacher's scores in float32, and the head is an identity [C, C]. Records are numbered in the
order of the split's file, whose fingerprint is in the index.
"""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from firstsight.caching import shards
from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.core.params import Precision
from firstsight.distillation.vocabulary import vocabulary_fingerprint
from firstsight.loss.products import fill_tiles
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.records.sample import Sample

STAGE = "cache-teacher-targets"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Index:
    """Hold the contents of index.json; `data`, `vocabulary` and `files` are checked on reading.

    `shared_vocabulary` is the number of tokens that both models have, `vocabulary` their fingerprint, and `ends` the
    teacher's and the student's end token where they differ (absent from the file where they do not).
    `classes` are the names of the classes that the targets are over (absent from the file for targets over tokens).
    `precision` is that in which the teacher was, or for `online` will be, loaded; `topk_error` is the mean KL per token
    from the exact teacher to its top k, by temperature; `files` has the SHA-256 of every other file of the folder.
    """

    kind: Literal["hidden", "topk", "online"]
    teacher: str
    precision: Precision
    data: dict[str, str]
    vocabulary: str
    shared_vocabulary: int
    answer_tokens: dict[str, int]
    bytes_per_token: int
    topk_error: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)
    ends: list[int] | None = None
    classes: list[str] | None = None

    @property
    def tokens(self) -> SharedVocabulary:
        """Return the tokens over which the targets compare the models."""
        return SharedVocabulary(self.shared_vocabulary, (self.ends[0], self.ends[1]) if self.ends else None)


class SplitTargetsWriter(shards.ShardWriter):
    """Write one split's targets, batch by batch, so that it continues after an interruption (`ShardWriter`)."""

    def write(self, tensors: dict[str, Tensor], lengths: list[int], error_sums: dict[str, float]) -> None:
        """Write a batch.

        Args:
            tensors: by name, `answers` among them, on the CPU, with a row per answer token.
            lengths: number of answer tokens of each record.
            error_sums: values to be summed over the split, by name, in the note "error_sums".

        Raises:
            UserError: a value is not finite; names the first such record.
        """
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(-1).nonzero()[0])
                record = self.records + bisect.bisect_right(list(accumulate(lengths)), row)
                raise UserError(
                    f"{self._split} split: expected finite values from the teacher, found NaN or infinity in {name} of "
                    f"record {record}; set targets.precision to float32, or repair or retrain the teacher"
                )
        integers = {"answers": tensors["answers"], "lengths": torch.tensor(lengths)}
        sums = self.notes.setdefault("error_sums", {})
        for name, value in error_sums.items():
            sums[name] = sums.get(name, 0.0) + value
        self.append(tensors | {name: tensor.to(torch.int32) for name, tensor in integers.items()}, len(lengths))


def write_index(folder: Path, index: Index, head: Tensor | None) -> None:
    """Write index.json and, for `hidden`, the teacher's head [V, H]: the last step, because it takes checksums of all.

    Raises:
        UserError: a value of the head is not finite.
    """
    if head is not None and not head.isfinite().all():
        raise UserError("teacher: expected a finite output head, found NaN or infinity; repair or retrain it")
    if head is not None:
        save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    values = asdict(replace(index, files=shards.checksums(folder)))
    write_json(folder / "index.json", {name: value for name, value in values.items() if value is not None})


def write_answers(folder: Path, answers: dict[str, str]) -> None:
    """Write answers.json: the teacher's answers by record id."""
    write_json(folder / "answers.json", answers)


def read_answers(folder: Path) -> dict[str, str]:
    """Read what `write_answers` wrote; {} where the file has null, for want of a teacher.

    Raises UserError when it is missing or broken.
    """
    return read_json(folder / "answers.json", STAGE) or {}


def read_index(folder: Path) -> Index:
    """Read index.json. Raises UserError when it is missing or broken."""
    return shards.read_index(folder, Index, STAGE)


def check_files(folder: Path, index: Index) -> None:
    """Raise UserError unless every file is as the index says that it was written."""
    shards.check_checksums(folder, index.files, STAGE)


def read_head(folder: Path, device: str) -> Tensor | None:
    """Load the teacher's head [V, H] over the shared vocabulary; None for targets other than `hidden`.

    On CUDA, rows of zeros are added up to whole tiles.
    """
    if read_index(folder).kind != "hidden":
        return None
    try:
        head = load_file(folder / "head.safetensors", device=device)["head"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: expected the teacher's head, found {error}; run {STAGE} again") from None
    return fill_tiles(head) if device == "cuda" else head


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless the targets' shared vocabulary and end are those of the student's tokenizer."""
    index = read_index(folder)
    same = vocabulary_fingerprint(tokenizer, index.shared_vocabulary) == index.vocabulary
    if not same or (index.ends and index.ends[1] != tokenizer.eos_token_id):
        raise UserError(
            f"{folder}: expected targets over the vocabulary of {tokenizer.name_or_path}, "
            f"found targets over another; run {STAGE} again"
        )


class Shards:
    """Read the shards that a `SplitTargetsWriter` wrote, memory-mapped, on access.

    Raises:
        OSError, SafetensorError: a file is broken.
    """

    def __init__(self, folder: Path, split: str):
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        self._files = [safe_open(path, framework="pt") for path in paths]
        answers = [file.get_tensor("answers") for file in self._files]
        lengths = [file.get_tensor("lengths") for file in self._files]
        # Where each shard begins and, below, where each record does, in answer tokens.
        self._starts = [0, *accumulate(map(len, answers))]
        self._answers = torch.cat(answers) if answers else torch.empty(0, dtype=torch.int32)
        self._offsets = [0, *torch.cat(lengths).cumsum(0).tolist()] if lengths else [0]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._offsets) - 1

    @property
    def answer_tokens(self) -> int:
        """Return the number of answer tokens of all records."""
        return self._starts[-1]

    def tokens(self, record: int) -> list[int]:
        """Return the answer tokens of a record."""
        return self._answers[self._offsets[record] : self._offsets[record + 1]].tolist()

    def rows(self, records: range) -> dict[str, Tensor]:
        """Read the other tensors' rows of consecutive records, one for each answer token."""
        start, end = self._offsets[records.start], self._offsets[records.stop]
        first = bisect.bisect_right(self._starts, start) - 1
        last = max(first + 1, bisect.bisect_left(self._starts, end))
        names = sorted(set(self._files[first].keys()) - {"answers", "lengths"})
        parts = [
            {name: file.get_slice(name)[max(start - base, 0) : end - base] for name in names}
            for file, base in zip(self._files[first:last], self._starts[first:last], strict=True)
        ]
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in names}


class SplitTargets:
    """Provide one split's targets to a dataset (a `TeacherSource`) from memory-mapped shards, read on access.

    Args:
        data: fingerprint of the split's file.

    Raises:
        UserError: a file is missing or broken, or the targets were made from another file.
    """

    def __init__(self, folder: Path, split: str, data: str):
        index = read_index(folder)
        if index.data.get(split) != data:
            raise UserError(
                f"{folder}: expected targets made from this {split} split ({data[:12]}), "
                f"found targets made from {str(index.data.get(split))[:12]}; run {STAGE} again"
            )
        self._folder, self._split = folder, split
        try:
            self._shards = Shards(folder, split)
        except (OSError, SafetensorError) as error:
            raise self._error(error) from None
        if (found := self._shards.answer_tokens) != (expected := index.answer_tokens.get(split)):
            raise self._error(f"{found} of {expected} answer tokens")

    def __len__(self) -> int:
        return len(self._shards)

    def answers(self, _sample: Sample, records: range) -> list[list[int]]:
        return [self._shards.tokens(one) for one in records]

    def features(self, _sample: Sample, records: range) -> dict[str, Tensor]:
        """Read the targets of the records: tensors with a row per answer token, in record order.

        Raises:
            UserError: a value is not finite, as in a damaged file.
        """
        rows = self._shards.rows(records)
        if not all(tensor.isfinite().all() for tensor in rows.values()):
            raise self._error(f"values that are not finite, at record {self._first_not_finite(records)}")
        return rows

    def without_answers(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[:0] for name, tensor in features.items()}

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([feature[name] for feature in features]) for name in features[0]}

    def _first_not_finite(self, records: range) -> int:
        return next(
            one
            for one in records
            if not all(tensor.isfinite().all() for tensor in self._shards.rows(range(one, one + 1)).values())
        )

    def _error(self, found: object) -> UserError:
        return UserError(f"{self._folder}: expected the {self._split} targets, found {found}; run {STAGE} again")

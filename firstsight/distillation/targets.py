"""What the teacher knows of every answer token, kept on disk: computed once, read by every distillation.

A folder of

    answers.json                 the teacher's own answers, by record id, to questions that came without one
    index.json                   what the targets are and, as fingerprints, what they were made from
    head.safetensors             the teacher's output head over the shared vocabulary [V, H]; for `hidden`
    {split}-00000.safetensors    shards of a split, each complete in itself: n answer tokens of r records

A shard holds `answers` [n] int32, `lengths` [r] int32 (the answer tokens of each record), and a row for each token:
for `hidden`, `hidden` [n, H], the final hidden states that predict the tokens, in the precision in which the teacher
computes, so that the loss made from them is the loss made with the teacher at hand, for any temperature, weight and
divergence; for `topk`, `ids` [n, k] int32, `best` [n, k] and `logsumexp` [n]. For `online` there is the index alone.
Records are numbered as they come in the split's file, whose fingerprint the index holds.
"""

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import fingerprint_files, read_json, write_json
from firstsight.core.params import Precision
from firstsight.core.stage import log
from firstsight.core.validation import describe
from firstsight.distillation.vocabulary import vocabulary_fingerprint
from firstsight.records.sample import Sample

# When a shard is full: what an interruption may cost, and how many files there are.
_SHARD_BYTES, _SHARD_RECORDS = 1 << 26, 2048
MADE_BY = "cache-teacher-targets"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Index:
    """Contents of index.json. `data`, `vocabulary` and `files` are compared on reading.

    `precision` is how the teacher was, or is to be, loaded; `topk_error` the mean KL a token of the exact teacher
    from its k best, by temperature; `files` the SHA-256 of every other file of the folder.
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


class SplitTargetsWriter:
    """Writes one split's targets, batch by batch, with one shard in memory.

    A shard appears whole or not at all, and ends where a batch does; so a writer over a folder that an interrupted one
    left goes on after `batches`, and the shards come out the same.
    """

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._pending: list[dict[str, Tensor]] = []
        self.batches, self._records, self._shards = 0, 0, 0
        self._error_sums: dict[str, float] = {}
        while (path := self._path(self._shards)).exists():
            try:
                with safe_open(path, framework="pt") as file:
                    written = json.loads(file.metadata()["written"])
                    shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
                if written.pop("sha256") != _checksum(shard, written):
                    raise SafetensorError("not as it was written")
            except (SafetensorError, OSError, ValueError, LookupError) as error:
                log.warning("%s is damaged (%s); made again from here on", path, error)
                for later in folder.glob(f"{split}-*.safetensors"):
                    if later >= path:
                        later.unlink()
                break
            self.batches, self._error_sums = written["batches"], written["error_sums"]
            self._records += len(shard["lengths"])
            self._shards += 1

    def write(self, tensors: dict[str, Tensor], lengths: list[int], error_sums: dict[str, float]) -> None:
        """A batch: tensors by name, `answers` among them, a row an answer token; the answer tokens of each record; and
        what is to be summed over the split.

        Raises:
            UserError: a value is not finite; names the first such record.
        """
        batch = {name: tensor.cpu() for name, tensor in tensors.items()}
        for name, tensor in batch.items():
            if not tensor.isfinite().all():
                row = int((~tensor.isfinite()).reshape(len(tensor), -1).any(-1).nonzero()[0])
                record = self._records + bisect.bisect_right(list(accumulate(lengths)), row)
                raise UserError(
                    f"{self._split} split: expected finite values from the teacher, found NaN or infinity in {name} of "
                    f"record {record}; set targets.precision to float32, or mend or fine-tune the teacher again"
                )
        integers = {"answers": batch["answers"], "lengths": torch.tensor(lengths)}
        self._pending.append(batch | {name: tensor.to(torch.int32) for name, tensor in integers.items()})
        self.batches += 1
        self._records += len(lengths)
        for name, value in error_sums.items():
            self._error_sums[name] = self._error_sums.get(name, 0.0) + value
        records = sum(len(batch["lengths"]) for batch in self._pending)
        size = sum(tensor.nbytes for batch in self._pending for tensor in batch.values())
        if records >= _SHARD_RECORDS or size >= _SHARD_BYTES:
            self._flush()

    def close(self) -> dict[str, float]:
        """Finish the split; returns what was summed over it."""
        if self._pending:
            self._flush()
        return self._error_sums

    def _flush(self) -> None:
        path = self._path(self._shards)
        partial = path.with_suffix(".partial")
        tensors = {name: torch.cat([batch[name] for batch in self._pending]) for name in self._pending[0]}
        written = {"batches": self.batches, "error_sums": self._error_sums}
        sealed = written | {"sha256": _checksum(tensors, written)}
        with writing(partial):
            save_file(tensors, partial, metadata={"written": json.dumps(sealed)})
        partial.replace(path)
        self._shards += 1
        self._pending = []

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._split}-{shard:05d}.safetensors"


def _checksum(tensors: dict[str, Tensor], written: dict[str, Any]) -> str:
    """SHA-256 of a shard: until the index is there, nothing else tells a number that has changed."""
    return hashlib.sha256(save(tensors, {"written": json.dumps(written)})).hexdigest()


def write_index(folder: Path, index: Index, head: Tensor | None) -> None:
    """Write index.json and, for `hidden`, the teacher's head [V, H]; the last step of building targets.

    Raises:
        UserError: a value of the head is not finite.
    """
    if head is not None and not head.isfinite().all():
        raise UserError("teacher: expected a finite output head, found NaN or infinity; mend or fine-tune it again")
    if head is not None:
        save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    files = {path.name: fingerprint_files([path]) for path in sorted(folder.iterdir())}
    write_json(folder / "index.json", asdict(replace(index, files=files)))


def write_answers(folder: Path, answers: dict[str, str]) -> None:
    """Write answers.json: the teacher's answers by record id."""
    write_json(folder / "answers.json", answers)


def read_answers(folder: Path) -> dict[str, str]:
    return read_json(folder / "answers.json", MADE_BY)


def read_index(folder: Path) -> Index:
    path = folder / "index.json"
    values = read_json(path, MADE_BY)
    try:
        return Index(**values)
    except TypeError:
        found = f"expected an index of targets, found {type(values).__name__}"
    except ValidationError as error:
        found = describe(error)
    raise UserError(f"{path}: {found}; run {MADE_BY} again")


def check_files(folder: Path, index: Index) -> None:
    """Compare every file with the index's checksum: a number that is wrong, but finite, would be learnt from.

    Raises:
        UserError: a file is missing or has changed since it was written.
    """
    for name, expected in index.files.items():
        try:
            found = fingerprint_files([folder / name])
        except OSError as error:
            found = str(error)
        if found != expected:
            raise UserError(
                f"{folder / name}: expected the file as it was written (SHA-256 {expected[:12]}), found {found[:80]}; "
                f"run {MADE_BY} again"
            )


def read_head(folder: Path, device: str) -> Tensor | None:
    """The teacher's head [V, H] over the shared vocabulary; None for targets that need none."""
    if read_index(folder).kind != "hidden":
        return None
    try:
        return load_file(folder / "head.safetensors", device=device)["head"]
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: expected the teacher's head, found {error}; run {MADE_BY} again") from None


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError unless the targets' shared vocabulary is the first tokens of the student's tokenizer."""
    index = read_index(folder)
    if vocabulary_fingerprint(tokenizer, index.shared_vocabulary) != index.vocabulary:
        raise UserError(
            f"{folder}: expected targets over the vocabulary of {tokenizer.name_or_path}, "
            f"found another vocabulary's; run {MADE_BY} again"
        )


class SplitTargets:
    """One split's targets, memory-mapped: only what is asked for is read.

    Raises:
        UserError: a file is missing or broken, or the split's data is not what the targets were made from.
    """

    def __init__(self, folder: Path, split: str, data: str):
        index = read_index(folder)
        if index.data.get(split) != data:
            raise UserError(
                f"{folder}: expected targets made from this {split} split ({data[:12]}), "
                f"found targets made from {str(index.data.get(split))[:12]}; run {MADE_BY} again"
            )
        self._folder, self._split = folder, split
        self._shards, self._starts, answers, lengths = [], [0], [], []
        try:
            for path in sorted(folder.glob(f"{split}-*.safetensors")):
                shard = safe_open(path, framework="pt")
                self._shards.append(shard)
                answers.append(shard.get_tensor("answers"))
                lengths.append(shard.get_tensor("lengths"))
                self._starts.append(self._starts[-1] + len(answers[-1]))
        except (OSError, SafetensorError) as error:
            raise self._broken(error) from None
        if self._starts[-1] != (expected := index.answer_tokens.get(split)):
            raise self._broken(f"{self._starts[-1]} of {expected} answer tokens")
        self._answers = torch.cat(answers)
        self._offsets = [0, *torch.cat(lengths).cumsum(0).tolist()]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def answers(self, _sample: Sample, records: range) -> list[list[int]]:
        return [self._answers[self._offsets[one] : self._offsets[one + 1]].tolist() for one in records]

    def of(self, _sample: Sample, records: range) -> dict[str, Tensor]:
        """The records' tensors, a row an answer token, one record after the other.

        Raises:
            UserError: a value is not finite, as from a damaged file.
        """
        parts = [self._rows(one) for one in records]
        for one, part in zip(records, parts, strict=True):
            if not all(tensor.isfinite().all() for tensor in part.values()):
                raise self._broken(f"values that are not finite, at record {one}")
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def blank(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a sample none of whose answers count."""
        return {name: tensor[:0] for name, tensor in tensors.items()}

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([feature[name] for feature in features]) for name in features[0]}

    def _rows(self, record: int) -> dict[str, Tensor]:
        start, end = self._offsets[record], self._offsets[record + 1]
        number = bisect.bisect_right(self._starts, start) - 1
        base, shard = self._starts[number], self._shards[number]
        names = set(shard.keys()) - {"answers", "lengths"}
        return {name: shard.get_slice(name)[start - base : end - base] for name in sorted(names)}

    def _broken(self, found: object) -> UserError:
        return UserError(f"{self._folder}: expected the {self._split} targets, found {found}; run {MADE_BY} again")

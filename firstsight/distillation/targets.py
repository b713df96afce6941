"""What the teacher knows of every answer token, kept on disk: computed once, read by every distillation.

A folder of

    index.json                   what the targets are and, as fingerprints, what they were made from
    head.safetensors             the teacher's output head over the shared vocabulary [V, H]; for `hidden`
    {split}.safetensors          answers [N] int32, and offsets [R + 1] int64: record r has tokens offsets[r:r+1]
    {split}-00000.safetensors    tensors of n rows, a row an answer token, in shards

For `hidden` a shard holds `hidden` [n, H], the final hidden states that predict the tokens, in the precision in which
the teacher computes, so that the loss made from them is the loss made with the teacher at hand, for any temperature,
weight and divergence. For `topk` it holds `ids` [n, k] int32, `best` [n, k] and `logsumexp` [n]. For `online` there
is the index alone. Records are numbered as they come in the split's file, whose fingerprint the index holds.
"""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.data.records import Sample
from firstsight.models.vocabulary import vocabulary_fingerprint

_SHARD_BYTES = 1 << 30
MADE_BY = "cache-teacher-targets"


@dataclass(frozen=True)
class Index:
    """Contents of index.json. `data` and `vocabulary` are compared on reading.

    `precision` is how the teacher was, or is to be, loaded; `topk_error` the mean KL a token of the exact teacher
    from its k best, by temperature.
    """

    kind: str
    teacher: str
    precision: str
    data: dict[str, str]
    vocabulary: str
    shared_vocabulary: int
    answer_tokens: dict[str, int]
    bytes_per_token: int
    topk_error: dict[str, float]


class SplitTargetsWriter:
    """Writes one split's targets, a record at a time, with one shard in memory."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._answers: list[Tensor] = []
        self._offsets, self._shard_starts = [0], [0]
        self._pending: list[dict[str, Tensor]] = []
        self._pending_bytes = 0

    def write(self, tensors: dict[str, Tensor], answers: Tensor) -> None:
        """One record's tensors, a row an answer token, and its answer tokens [n]."""
        self._pending.append({name: tensor.cpu() for name, tensor in tensors.items()})
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._answers.append(answers.cpu().to(torch.int32))
        self._offsets.append(self._offsets[-1] + len(answers))
        if self._pending_bytes >= _SHARD_BYTES:
            self._flush()

    def close(self) -> int:
        """Finish the split; returns its number of answer tokens."""
        self._flush()
        tensors = {
            "answers": torch.cat(self._answers),
            "offsets": torch.tensor(self._offsets),
            "shard_starts": torch.tensor(self._shard_starts),
        }
        save_file(tensors, self._folder / f"{self._split}.safetensors")
        return self._offsets[-1]

    def _flush(self) -> None:
        if self._pending:
            name = f"{self._split}-{len(self._shard_starts) - 1:05d}.safetensors"
            names = self._pending[0]
            save_file({one: torch.cat([record[one] for record in self._pending]) for one in names}, self._folder / name)
            self._shard_starts.append(self._offsets[-1])
            self._pending, self._pending_bytes = [], 0


def write_index(folder: Path, index: Index, head: Tensor | None) -> None:
    """Write index.json and, for `hidden`, the teacher's head [V, H]; the last step of building targets."""
    if head is not None:
        save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    write_json(folder / "index.json", asdict(index))


def read_index(folder: Path) -> Index:
    values = read_json(folder / "index.json", MADE_BY)
    try:
        return Index(**values)
    except TypeError:
        raise UserError(
            f"{folder / 'index.json'}: expected the keys {[f.name for f in fields(Index)]}, "
            f"found {str(values)[:100]}; run {MADE_BY} again"
        ) from None


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
        try:
            tensors = load_file(folder / f"{split}.safetensors")
            self._offsets, self._starts = tensors["offsets"].tolist(), tensors["shard_starts"].tolist()
            self._answers = tensors["answers"]
            self._shards = [
                safe_open(folder / f"{split}-{number:05d}.safetensors", framework="pt")
                for number in range(len(self._starts) - 1)
            ]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: expected the {split} targets, found {error}; run {MADE_BY} again") from None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def of(self, _sample: Sample, records: range) -> tuple[list[list[int]], dict[str, Tensor]]:
        """Answer tokens of these records, and their tensors, a row an answer token, one record after the other."""
        answers = [self._answers[self._offsets[one] : self._offsets[one + 1]].tolist() for one in records]
        parts = [self._rows(one) for one in records]
        return answers, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def collate(self, features: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([feature[name] for feature in features]) for name in features[0]}

    def _rows(self, record: int) -> dict[str, Tensor]:
        start, end = self._offsets[record], self._offsets[record + 1]
        shard = bisect.bisect_right(self._starts, start) - 1
        base = self._starts[shard]
        file = self._shards[shard]
        return {name: file.get_slice(name)[start - base : end - base] for name in file.keys()}  # noqa: SIM118

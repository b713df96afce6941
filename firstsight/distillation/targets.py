"""What the teacher knows of every answer token, kept on disk: computed once, read by every distillation.

A folder of

    index.json                   fingerprints of what the targets were made from, and their shape
    head.safetensors             the teacher's output head over the shared vocabulary [V, H]
    {split}.safetensors          answers [N] int32, and offsets [R + 1] int64: record r has tokens offsets[r:r+1]
    {split}-00000.safetensors    hidden [n, H], the final hidden states that predict those tokens, in shards

Hidden states keep the precision in which the teacher computes, so that the loss made from them is the loss made with
the teacher at hand, for any temperature, weight and divergence. Records are numbered as they come in the split's
file, whose fingerprint the index holds.
"""

import bisect
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from firstsight.core.errors import UserError
from firstsight.core.files import read_json, write_json
from firstsight.models.vocabulary import vocabulary_fingerprint

_SHARD_BYTES = 1 << 30
MADE_BY = "cache-teacher-targets"


@dataclass(frozen=True)
class Index:
    """Contents of index.json. `data` and `vocabulary` are compared on reading; the rest says what the targets are."""

    kind: str
    teacher: str
    data: dict[str, str]
    vocabulary: str
    shared_vocabulary: int
    dtype: str
    hidden_size: int
    answer_tokens: dict[str, int]


class SplitTargetsWriter:
    """Writes one split's targets, a record at a time, with one shard in memory."""

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._answers: list[Tensor] = []
        self._offsets, self._shard_starts = [0], [0]
        self._pending: list[Tensor] = []
        self._pending_bytes = 0

    def write(self, hidden: Tensor, answers: Tensor) -> None:
        """One record's hidden states [n, H] and answer tokens [n]."""
        self._pending.append(hidden.cpu())
        self._pending_bytes += hidden.nbytes
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
            save_file({"hidden": torch.cat(self._pending)}, self._folder / name)
            self._shard_starts.append(self._offsets[-1])
            self._pending, self._pending_bytes = [], 0


def write_index(folder: Path, index: Index, head: Tensor) -> None:
    """Write index.json and the teacher's head [V, H] over the shared vocabulary; the last step of building targets."""
    save_file({"head": head.detach().cpu().contiguous()}, folder / "head.safetensors")
    write_json(folder / "index.json", asdict(index))


def read_index(folder: Path) -> Index:
    values = read_json(folder / "index.json", MADE_BY)
    try:
        return Index(**values)
    except TypeError:
        raise UserError(
            f"{folder / 'index.json'}: expected the keys {[f.name for f in fields(Index)]}, "
            f"found {sorted(values)}; run {MADE_BY} again"
        ) from None


def read_head(folder: Path) -> Tensor:
    """The teacher's head [V, H] over the shared vocabulary."""
    return load_file(folder / "head.safetensors")["head"]


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

    def answers(self, record: int) -> Tensor:
        """Answer tokens [n] of the split's record number `record`, int64."""
        return self._answers[self._offsets[record] : self._offsets[record + 1]].long()

    def hidden(self, record: int) -> Tensor:
        """Teacher's final hidden states [n, H] that predict the record's answer tokens."""
        start, end = self._offsets[record], self._offsets[record + 1]
        shard = bisect.bisect_right(self._starts, start) - 1
        base = self._starts[shard]
        return self._shards[shard].get_slice("hidden")[start - base : end - base]

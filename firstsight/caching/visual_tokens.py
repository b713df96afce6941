"""Store what a frozen vision tower makes of every image and video: computed once, read by every training.

The folder holds

    index.json                   fingerprints of what the visual tokens were made from
    {split}-00000.safetensors    shards of a split, each readable alone, of r samples

A shard holds the tensors of its samples end to end, and `lengths` [r, k] int32, the rows that each sample has of each
of the k tensors, in the order of their names, -1 of one that it lacks. `visual_tokens` [n, H] are the tower's
outputs after its projector, in the dtype in which training would compute them. The other tensors are those of
`firstsight.packing.pack.expand`, without pixels and with integers as int32. Samples are in the order of the split's
file, whose fingerprint is in the index.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict, field, replace
from itertools import accumulate
from pathlib import Path

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firstsight.caching import shards
from firstsight.core.errors import UserError
from firstsight.core.files import write_json
from firstsight.core.params import Precision

STAGE = "cache-visual-tokens"
_TOKENS = "visual_tokens"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class VisualIndex:
    """Hold the contents of index.json.

    `student` is the fingerprint of the student's folder, weights and processor, `precision` that in which it was
    loaded, and `data` has the fingerprint of each split's file. `samples` and `tokens` count each split's samples and
    visual tokens; `files` has the SHA-256 of every other file of the folder.
    """

    student: str
    precision: Precision
    data: dict[str, str]
    samples: dict[str, int]
    tokens: dict[str, int]
    files: dict[str, str] = field(default_factory=dict)


class VisualTokensWriter(shards.ShardWriter):
    """Write one split's visual tokens, sample by sample, so that it continues after an interruption (`ShardWriter`).

    The note "tokens" is the number of visual tokens.
    """

    def write(self, expanded: dict[str, Tensor], tokens: Tensor | None) -> None:
        """Write a sample: what `without_pixels` returned, and its visual tokens on the CPU, if it has any.

        Raises:
            UserError: a token is not finite; names the sample by its number.
        """
        if tokens is not None and not tokens.isfinite().all():
            raise UserError(
                f"{self._split} split: expected finite visual tokens from the student, found NaN or infinity in "
                f"those of sample {self.records}; repair the student, or set train.method to full for float32"
            )
        kept = expanded if tokens is None else expanded | {_TOKENS: tokens}
        integers = {name: tensor.to(torch.int32) for name, tensor in kept.items() if not tensor.is_floating_point()}
        self.notes["tokens"] = self.notes.get("tokens", 0) + (0 if tokens is None else len(tokens))
        self.append(kept | integers, 1)

    def _joined(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        names = sorted({name for batch in batches for name in batch})
        lengths = [[len(batch[name]) if name in batch else -1 for name in names] for batch in batches]
        tensors = {name: torch.cat([batch[name] for batch in batches if name in batch]) for name in names}
        return tensors | {"lengths": torch.tensor(lengths, dtype=torch.int32)}


def without_pixels(expanded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of a sample, as `firstsight.packing.pack.expand` returned them, that are kept on disk."""
    return {name: tensor for name, tensor in expanded.items() if not name.startswith("pixel_values")}


def write_visual_index(folder: Path, index: VisualIndex) -> None:
    """Write index.json: the last step, because it takes checksums of all."""
    write_json(folder / "index.json", asdict(replace(index, files=shards.checksums(folder))))


def read_visual_index(folder: Path, student: str, precision: str) -> VisualIndex:
    """Read index.json and compare every file with its checksum.

    Raises:
        UserError: a file is missing or broken, or the visual tokens are those of another student or precision than the
            fingerprint and the precision given.
    """
    index = shards.read_index(folder, VisualIndex, STAGE)
    if index.student != student:
        raise UserError(
            f"{folder}: expected visual tokens made by the weights and the processor in models/student "
            f"({student[:12]}), found those of others ({index.student[:12]}); run {STAGE} again"
        )
    if index.precision != precision:
        raise UserError(
            f"{folder}: expected visual tokens of a student loaded as {precision}, as train.method says, found them "
            f"of one loaded as {index.precision}; run {STAGE} again"
        )
    shards.check_checksums(folder, index.files, STAGE)
    return index


class SplitVisualTokens:
    """Provide one split's visual tokens to a dataset (a `VisualSource`) from memory-mapped shards, read on access.

    Args:
        data: fingerprint of the split's file.

    Raises:
        UserError: a file is broken, or the visual tokens were made from another split's file.
    """

    def __init__(self, folder: Path, split: str, index: VisualIndex, data: str):
        if index.data.get(split) != data:
            raise UserError(
                f"{folder}: expected visual tokens made from this {split} split ({data[:12]}), found those made from "
                f"{str(index.data.get(split))[:12]}; run {STAGE} again"
            )
        try:
            self._files = [safe_open(path, framework="pt") for path in sorted(folder.glob(f"{split}-*.safetensors"))]
            lengths = [file.get_tensor("lengths") for file in self._files]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{folder}: expected the {split} split's visual tokens, found {error}; run {STAGE} again"
            ) from None
        self._names = [sorted(set(file.keys()) - {"lengths"}) for file in self._files]
        # Where each shard begins, in samples, and where each sample's rows end in each of the shard's tensors.
        self._starts = [0, *accumulate(map(len, lengths))]
        self._lengths, self._ends = lengths, [one.clamp(min=0).cumsum(0) for one in lengths]
        if len(self) != (expected := index.samples.get(split)):
            raise UserError(
                f"{folder}: expected the visual tokens of the {split} split's {expected} samples, found those of "
                f"{len(self)}; run {STAGE} again"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def expanded(self, place: int) -> dict[str, Tensor]:
        """Return what `firstsight.packing.pack.expand` returned for all records of a sample, without its pixels."""
        found = self._rows(place, lambda name: name != _TOKENS)
        return {name: rows.long() if rows.dtype == torch.int32 else rows for name, rows in found.items()}

    def tokens(self, place: int) -> dict[str, Tensor]:
        """Return a sample's visual tokens [n, H] under the key "visual_tokens"; nothing without images and videos."""
        return self._rows(place, lambda name: name == _TOKENS)

    def _rows(self, place: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Read the rows of a sample in each wanted tensor that it has, by name."""
        shard = bisect.bisect_right(self._starts, place) - 1
        file, row = self._files[shard], place - self._starts[shard]
        lengths, ends = self._lengths[shard][row].tolist(), self._ends[shard][row].tolist()
        return {
            name: file.get_slice(name)[end - length : end]
            for name, length, end in zip(self._names[shard], lengths, ends, strict=True)
            if length >= 0 and wanted(name)
        }

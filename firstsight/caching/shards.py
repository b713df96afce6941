"""Store tensors of a split in safetensors shards that survive an interruption and are read by memory map."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from firstsight.core.errors import UserError
from firstsight.core.faults import writing
from firstsight.core.files import fingerprint_files, read_json
from firstsight.core.processes import collected, from_main, is_main_process, share
from firstsight.core.progress import progress
from firstsight.core.stage import log
from firstsight.core.validation import describe

Index = TypeVar("Index")

# The size of a shard: smaller ones lose less work to an interruption, larger ones make fewer files.
_SHARD_BYTES, _SHARD_RECORDS = 1 << 26, 2048


class ShardWriter:
    """Write one split's tensors, batch by batch, with one shard in memory.

    Shards are renamed into place when complete, and end with a batch: after an interruption, a new writer over the same
    folder continues after `batches` batches, which have `records` records, and the shards come out the same. `notes`
    are JSON values that each shard keeps beside its tensors, for a writer that continues.
    """

    def __init__(self, folder: Path, split: str):
        self._folder, self._split = folder, split
        self._pending: list[dict[str, Tensor]] = []
        self.batches, self.records, self._pending_records, self._shards = 0, 0, 0, 0
        self.notes: dict[str, Any] = {}
        while (path := self._path(self._shards)).exists():
            try:
                with safe_open(path, framework="pt") as file:
                    written = json.loads(file.metadata()["written"])
                    shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                if written.pop("sha256") != _checksum(shard, written):
                    raise SafetensorError("its checksum differs")
            except (SafetensorError, OSError, ValueError, LookupError) as error:
                log.warning("%s is damaged (%s); it and later shards are computed again", path, error)
                for later in folder.glob(f"{split}-*.safetensors"):
                    if later >= path:
                        later.unlink()
                break
            self.batches, self.notes = written.pop("batches"), written
            self.records += len(shard["lengths"])
            self._shards += 1

    def append(self, batch: dict[str, Tensor], records: int) -> None:
        """Write a batch of tensors, on the CPU, of so many records."""
        self._pending.append(batch)
        self.batches += 1
        self.records += records
        self._pending_records += records
        size = sum(tensor.nbytes for batch in self._pending for tensor in batch.values())
        if self._pending_records >= _SHARD_RECORDS or size >= _SHARD_BYTES:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write the last shard and return the `notes`."""
        if self._pending:
            self._flush()
        return self.notes

    def _joined(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a shard of these batches; `lengths` among them has a row for each record."""
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def _flush(self) -> None:
        path = self._path(self._shards)
        partial = path.with_suffix(".partial")
        tensors = self._joined(self._pending)
        written = {"batches": self.batches, **self.notes}
        sealed = written | {"sha256": _checksum(tensors, written)}
        with writing(partial):
            save_file(tensors, partial, metadata={"written": json.dumps(sealed)})
        partial.replace(path)
        self._shards += 1
        self._pending, self._pending_records = [], 0

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._split}-{shard:05d}.safetensors"


def write_shared(
    kind: type[ShardWriter],
    folder: Path,
    split: str,
    batches: Sequence[Sequence[Any]],
    compute: Callable[[Sequence[Sequence[Any]]], Iterable[tuple]],
    label: str,
    unit: str,
) -> dict[str, Any]:
    """Have all processes compute the batches that are not yet written, and the main process write them.

    A batch is computed as it is, by one process: what is written does not depend on how many there are.

    Args:
        kind: a writer whose `write` takes what `compute` yields.
        compute: yields for each of the batches that it is given what is to be written, tensors on the CPU.
        label, unit: what progress is called, and what a batch has several of.

    Returns:
        The writer's `notes`, in every process, when all shards are written.
    """
    writer: Any = kind(folder, split) if is_main_process() else None
    done = from_main(writer.batches if writer else 0)
    remaining = batches[done:]
    total, known = sum(map(len, batches)), sum(map(len, batches[:done]))
    if done:
        log.info("%s: resuming after %d of %d %s", label, known, total, unit)
    with progress(desc=label, unit=unit, total=total, initial=known) as shown:
        # Elsewhere than in the main process, nothing comes out.
        for computed, batch in zip(collected(compute(share(remaining)), len(remaining)), remaining, strict=False):
            writer.write(*computed)
            shown.update(len(batch))
    return from_main(writer.close() if writer else {})


def _checksum(tensors: dict[str, Tensor], written: dict[str, Any]) -> str:
    """Return the SHA-256 of a shard; until the index is written, nothing else reveals a changed value."""
    return hashlib.sha256(save(tensors, {"written": json.dumps(written)})).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, by name, for its index."""
    return {path.name: fingerprint_files([path]) for path in sorted(folder.iterdir())}


def check_checksums(folder: Path, files: dict[str, str], stage: str) -> None:
    """Compare every file with its checksum in the index: a changed but finite value would be trained on unnoticed.

    Raises:
        UserError: a file is missing or differs; it says to run `stage` again.
    """
    for name, expected in files.items():
        try:
            found = fingerprint_files([folder / name])
        except OSError as error:
            found = str(error)
        if found != expected:
            raise UserError(
                f"{folder / name}: expected the file as it was written (SHA-256 {expected[:12]}), found {found[:80]}; "
                f"run {stage} again"
            )


def read_index(folder: Path, kind: type[Index], stage: str) -> Index:
    """Read a folder's index.json as the dataclass `kind`. Raises UserError when it is missing or broken."""
    path = folder / "index.json"
    values = read_json(path, stage)
    try:
        return kind(**values)
    except TypeError:
        found = f"expected an index, found {type(values).__name__}"
    except ValidationError as error:
        found = describe(error)
    raise UserError(f"{path}: {found}; run {stage} again")

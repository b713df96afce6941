"""Measure what it saves that batches hold samples of about the same length.

    python -m benchmarks.padding [STEPS]       after dvc repro; 8 steps by default

Two passes are measured, each over the samples as they come and with the longest first, as the stages order them:

- training: the samples of a step, 16 of them, in micro-batches of 1, 2, 4 and 8. The student reads them and computes a
  gradient; nothing is updated. The ordering is timed too, for which samples are read, as in a first epoch.
- targets: 16 samples for each step, evenly spread over the train split, in batches of `targets.batch_size`. The teacher
  reads them. With the longest first is how cache-teacher-targets scores classes, 16 batches at a time.

`padding` is the share of all tokens that are padding. Both orders are timed in turns. Writes benchmarks/padding.csv,
and keeps the rows of models of other types in it.
"""

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from benchmarks.measuring import environment, write
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import PackedDataset, dataset_class
from firstsight.packing.forward import answer_states, class_scores
from firstsight.records.length import estimated_tokens, longest_first
from firstsight.records.parquet import Split
from firstsight.training.trainer import EpochShuffle

TRAIN = Path("data/egoqa/train.parquet")
FOLDERS = {"training": Path("models/student"), "targets": Path("models/teacher-finetuned")}
FILE = Path(__file__).parent / "padding.csv"
SAMPLES, MICRO_BATCHES = 16, (1, 2, 4, 8)
ORDERS = ("as drawn", "longest first")


def run() -> None:
    steps = int(sys.argv[1]) if sys.argv[1:] else 8
    loaded = params.load()
    device, split = pick_device(loaded.runtime.device), Split(TRAIN)
    models = {}
    for work, folder in FOLDERS.items():
        processor = load_processor(folder)
        dataset = dataset_class(processor, over_classes=bool(split.classes))(split, processor)
        models[work] = load_model(folder, "auto", device, classes=split.classes), dataset
    rows = [row for row in known() if row["model"] not in {model.config.model_type for model, _ in models.values()}]
    for work, size in (*(("training", size) for size in MICRO_BATCHES), ("targets", loaded.targets.batch_size)):
        model, dataset = models[work]
        found = (training if work == "training" else reading)(model, dataset, size, steps)
        for order in ORDERS:
            seconds, padding = found[order]
            rows.append({
                "model": model.config.model_type,
                "pass": work,
                "batch": size,
                "order": order,
                "samples": min(steps * SAMPLES, len(split)),
                "padding": round(padding, 3),
                "seconds": round(seconds, 2),
                "time_ratio": round(seconds / found[ORDERS[0]][0], 2),
                **environment(device),
            })  # fmt: skip
            log.info("%(pass)s, batches of %(batch)d, %(order)s: %(padding).3f padding, %(seconds).1f s", rows[-1])
    write("padding", rows)


def known() -> list[dict[str, Any]]:
    """Return the rows of earlier runs."""
    if not FILE.exists():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def training(model: Any, dataset: PackedDataset, size: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of so many training steps, and the share of padding in them, by the samples' order."""
    micro_batches = {}
    for order in ORDERS:
        sorts = order == "longest first"
        samples = EpochShuffle(dataset, 0, SAMPLES, micro_batch=size if sorts else SAMPLES)
        micro_batches[order] = iter(BatchSampler(samples, size, drop_last=False))
    spent = {order: Spent() for order in ORDERS}
    for step in range(-1, steps):  # the first warms up
        for order in ORDERS:
            started = time.perf_counter()
            taken = list(islice(micro_batches[order], SAMPLES // size))
            ordering = time.perf_counter() - started
            found = [differentiated(model, dataset, indices) for indices in taken]
            if step >= 0:
                spent[order] += sum(found, Spent(ordering))
    return {order: (one.seconds, one.padding) for order, one in spent.items()}


def reading(model: Any, dataset: PackedDataset, size: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of passes without gradients over samples of the split, and the share of padding, by order."""
    count = min(steps * SAMPLES, len(dataset.split))
    chosen = [number * len(dataset.split) // count for number in range(count)]
    lengths = [estimated_tokens(sample, sample.records) for sample in map(dataset.split.__getitem__, chosen)]
    orders = dict(zip(ORDERS, (chosen, [chosen[number] for number in longest_first(lengths)]), strict=True))
    starts = range(0, count, size)
    spent = {order: Spent() for order in ORDERS}
    for number, start in enumerate((0, *starts)):
        for order, numbers in orders.items():
            found = read(model, dataset, numbers[start : start + size])
            if number > 0:  # the first warms up
                spent[order] += found
    return {order: (one.seconds, one.padding) for order, one in spent.items()}


@dataclass(frozen=True)
class Spent:
    """Hold the seconds of passes over batches, and the tokens in these: all, and those that are no padding."""

    seconds: float = 0.0
    tokens: int = 0
    own: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.tokens + other.tokens, self.own + other.own)

    @property
    def padding(self) -> float:
        """Return the share of the tokens that are padding."""
        return 1 - self.own / self.tokens


def differentiated(model: Any, dataset: PackedDataset, indices: Sequence[int]) -> Spent:
    """Compute what training compares with the teacher's, and a gradient of it."""
    return timed(dataset, indices, model, lambda found: found.float().square().mean().backward())


@torch.inference_mode()
def read(model: Any, dataset: PackedDataset, indices: Sequence[int]) -> Spent:
    """Compute what targets are made of."""
    return timed(dataset, indices, model, lambda found: found)


def timed(dataset: PackedDataset, indices: Sequence[int], model: Any, then: Callable[[Tensor], object]) -> Spent:
    """Run the model over a batch of these samples, and something more on what comes out, on the clock."""
    batch = dataset.collate([dataset[index] for index in indices])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    classes = len(dataset.split.classes or ())
    started = time.perf_counter()
    then(class_scores(model, batch, classes) if classes else answer_states(model, batch, batch["labels"])[0])
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad()
    return Spent(seconds, batch["input_ids"].numel(), read_tokens(batch))


def read_tokens(batch: dict[str, Any]) -> int:
    """Return the number of tokens that are no padding."""
    read = batch["attention_mask"] > 0 if "attention_mask" in batch else batch["segment_ids"] >= 0
    return int(read.sum())


if __name__ == "__main__":
    main(run)

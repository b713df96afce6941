"""Measure what it saves that the micro-batches of an optimizer step hold samples of about the same length.

    python -m benchmarks.padding [STEPS]       after dvc repro; 8 steps by default

The samples of a step are those that training takes, 16 of them, in micro-batches of 1, 2, 4 and 8: once in the order in
which they were drawn, once with the longest first, as training orders them. The student reads them and computes a
gradient; nothing is updated. `padding` is the share of all tokens that are padding. Each step is timed in both orders,
one after the other, and so is the ordering, for which samples are read, as in a first epoch. Writes
benchmarks/padding.csv, and keeps the rows of students of another type in it.
"""

import csv
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler

from benchmarks.measuring import environment, write
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.dataset import PackedDataset, dataset_class
from firstsight.packing.forward import answer_states, class_scores
from firstsight.records.parquet import Split
from firstsight.training.trainer import EpochShuffle

STUDENT, TRAIN = Path("models/student"), Path("data/egoqa/train.parquet")
FILE = Path(__file__).parent / "padding.csv"
SAMPLES, MICRO_BATCHES = 16, (1, 2, 4, 8)
ORDERS = ("as drawn", "longest first")


def run() -> None:
    steps = int(sys.argv[1]) if sys.argv[1:] else 8
    device = pick_device(params.load().runtime.device)
    split, processor = Split(TRAIN), load_processor(STUDENT)
    model = load_model(STUDENT, "auto", device, classes=split.classes)
    dataset = dataset_class(processor, over_classes=bool(split.classes))(split, processor)
    rows = [row for row in known() if row["student"] != model.config.model_type]
    for size in MICRO_BATCHES:
        found = compared(model, dataset, size, steps)
        for order in ORDERS:
            seconds, padding = found[order]
            rows.append({
                "student": model.config.model_type,
                "micro_batch": size,
                "order": order,
                "samples": steps * SAMPLES,
                "padding": round(padding, 3),
                "seconds": round(seconds, 2),
                "time_ratio": round(seconds / found[ORDERS[0]][0], 2),
                **environment(device),
            })  # fmt: skip
            log.info("micro-batches of %(micro_batch)d, %(order)s: %(padding).3f padding, %(seconds).1f s", rows[-1])
    write("padding", rows)


def known() -> list[dict[str, Any]]:
    """Return the rows of earlier runs."""
    if not FILE.exists():
        return []
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def compared(model: Any, dataset: PackedDataset, size: int, steps: int) -> dict[str, tuple[float, float]]:
    """Return the seconds of so many steps, and the share of their tokens that are padding, by the samples' order."""
    micro_batches = {}
    for order in ORDERS:
        longest_first = order == "longest first"
        samples = EpochShuffle(dataset, 0, SAMPLES, micro_batch=size if longest_first else SAMPLES)
        micro_batches[order] = iter(BatchSampler(samples, size, drop_last=False))
    seconds, tokens, read = (dict.fromkeys(ORDERS, 0) for _ in range(3))
    for step in range(-1, steps):  # the first warms up
        for order in ORDERS:
            started = time.perf_counter()
            taken = list(islice(micro_batches[order], SAMPLES // size))
            seconds[order] += time.perf_counter() - started if step >= 0 else 0
            for indices in taken:
                batch = dataset.collate([dataset[index] for index in indices])
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                started = time.perf_counter()
                differentiate(model, batch, len(dataset.split.classes or ()))
                if step >= 0:
                    seconds[order] += time.perf_counter() - started
                    tokens[order] += batch["input_ids"].numel()
                    read[order] += read_tokens(batch)
    return {order: (seconds[order], 1 - read[order] / tokens[order]) for order in ORDERS}


def differentiate(model: Any, batch: dict[str, Any], classes: int) -> None:
    """Compute what training compares with the teacher's, and a gradient of it."""
    found = class_scores(model, batch, classes) if classes else answer_states(model, batch, batch["labels"])[0]
    found.float().square().mean().backward()
    if found.is_cuda:
        torch.cuda.synchronize()
    model.zero_grad()


def read_tokens(batch: dict[str, Any]) -> int:
    """Return the number of tokens that are no padding."""
    read = batch["attention_mask"] > 0 if "attention_mask" in batch else batch["segment_ids"] >= 0
    return int(read.sum())


if __name__ == "__main__":
    main(run)

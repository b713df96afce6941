"""Measure what distilling adds to a language model that learns from published texts.

The part `wikitext` of benchmarks.text, which says what the models are. The student has every second layer of the
teacher, and learns from paragraphs of valid.txt: by fine-tuning alone, and distilled, in equally many steps on the
same texts. Perplexity and bits per byte are those of paragraphs of test.txt, with 95% intervals from resampling
articles; the gain's is that of a paired comparison.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import environment
from benchmarks.text_models import halved
from firstsight.core import params, yaml12
from firstsight.core.stage import log
from firstsight.evaluation.metrics import bootstrap_interval
from firstsight.evaluation.perplexity import loss_table, perplexity, summarise_texts
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.records.parquet import Split
from firstsight.records.text_loss import TextLoss
from stages import (
    build_egoqa_dataset,
    cache_teacher_targets,
    check_inputs,
    distill,
    download_models,
    finetune_student,
    finetune_teacher,
)

ROOT = Path.cwd()
INTERVAL_SAMPLES, SEED = 1000, 0


@dataclass(frozen=True)
class Scale:
    """Say how much is trained and measured: texts of each split, tokens of each, and the numbers of a step."""

    train: int = 480
    validation: int = 40
    test: int = 160
    max_tokens: int = 128
    batch_size: int = 4
    epochs: float = 1.0
    learning_rate: float = 3e-4
    temperatures: tuple[float, ...] = (1.0, 2.0)


def wikitext(texts: Path, teacher: Path, scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield a row for the teacher, the student before, fine-tuned alone, and distilled at each temperature."""
    values = yaml12.load(ROOT / "presets/wikitext-gpt2.yaml")
    values["data"] |= {
        "source": "text",
        "hub": None,
        "path": str((texts / "valid.txt").resolve()),
        "benchmark": {"source": "text", "path": str((texts / "test.txt").resolve()), "media_root": None},
        "validation_fraction": 0.1,
        "test_fraction": 0.0,
        **{f"{split}_samples": getattr(scale, split) for split in ("train", "validation", "test")},
        "max_tokens": scale.max_tokens,
    }
    values["train"] |= {
        "epochs": scale.epochs,
        "batch_size": scale.batch_size,
        "learning_rate": scale.learning_rate,
        "seed": SEED,
    }
    values["targets"]["batch_size"] = scale.batch_size
    values["runtime"] = {"device": "auto", "data_workers": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        halved(teacher, folder / "halved")
        for role, source in (("teacher", teacher.resolve()), ("student", folder / "halved")):
            values["models"][role] = {"source": str(source), "revision": None, "init": None}
        with chdir(folder):
            yield from _wikitext(values, scale)


def _wikitext(values: dict[str, Any], scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the rows of `wikitext` from a run of its stages in the current folder."""
    save(values)
    for role in ("teacher", "student"):
        download_models.run(role)
    build_egoqa_dataset.run()
    check_inputs.run()
    device = pick_device("auto")
    before = measured(Path("models/student"), device)
    for name, model in (("teacher", Path("models/teacher")), ("student", Path("models/student"))):
        yield result(name, model, None, 0.0, measured(model, device), before, device)
    finetune_teacher.run()
    cache_teacher_targets.run()
    started = time.perf_counter()
    finetune_student.run()
    seconds, model = time.perf_counter() - started, finetune_student.OUTPUT
    alone = measured(model, device)
    yield result("student, fine-tuned", model, None, seconds, alone, before, device)
    for temperature in scale.temperatures:
        values["train"]["temperature"] = temperature
        save(values)
        started = time.perf_counter()
        distill.run()
        seconds, model = time.perf_counter() - started, distill.OUTPUT
        yield result("student, distilled", model, temperature, seconds, measured(model, device), alone, device)


def save(values: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml12.dump(values), encoding="utf-8")


def measured(model: Path, device: str) -> list[TextLoss]:
    """Return the losses of the test texts."""
    texts = [(sample, record) for sample in Split(Path("data/egoqa/test.parquet")) for record in sample.records]
    loaded = PyTorchModel(load_model(model, "float32", device), load_processor(model), "float32")
    return list(loaded.text_losses(texts, 8))


def result(
    name: str,
    model: Path,
    temperature: float | None,
    seconds: float,
    losses: list[TextLoss],
    reference: list[TextLoss],
    device: str,
) -> dict[str, Any]:
    """Return a row of the CSV file.

    `saved` is the perplexity of the reference, which is the student fine-tuned alone for distilled ones and otherwise
    the student before, minus the model's own.
    """
    groups = [sample.group for sample in Split(Path("data/egoqa/test.parquet")) for _ in sample.records]
    figures = summarise_texts(losses, groups, [], INTERVAL_SAMPLES, SEED)
    both = np.stack([loss_table(reference), loss_table(losses)], axis=1)

    def saved(drawn: np.ndarray) -> float:
        return perplexity(drawn[:, 0]) - perplexity(drawn[:, 1])

    low, high = bootstrap_interval(both, groups, INTERVAL_SAMPLES, SEED, saved)
    figures |= {"saved": saved(both), "saved_low": low, "saved_high": high}
    history = model / "history.json"
    trained = history.exists() and json.loads(history.read_text(encoding="utf-8"))
    log.info("%s: perplexity %.2f", name, figures["perplexity"])
    return {
        "model": name,
        "temperature": temperature,
        "alpha": params.load().train.alpha if temperature else None,
        "steps": trained[-1]["step"] if trained else 0,
        **{key: round(value, 4) for key, value in figures.items()},
        "seconds": round(seconds),
        **environment(device),
    }

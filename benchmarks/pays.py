"""Measure when distilling pays: students of equally many steps that differ in what they learn from.

    python -m benchmarks.pays [SEED ...]     after dvc repro, with its params.yaml; seeds 0 to 4 by default
    python -m benchmarks.pays table          print benchmarks/pays.csv as a table and draw benchmarks/pays.png

A seed draws its own scenes, test split, labelled scenes and order of samples; teacher and student are those of models/.
First come the models that others are compared with: the teacher, and the student before it learns anything. For each
share of labelled scenes, a student learns from the labels alone, one also from the teacher's answers to the other
questions, and one from the teacher's distributions; at the share of params.yaml the latter at several temperatures and
alphas. Where all scenes are labelled, students also learn from labels of which a share is wrong. Last, a grey patch
hides a quarter of every picture, in the test split too, so that the true answer is often a matter of chance. Each row
of benchmarks/pays.csv is a model: its exact match on the seed's test split. Rows that are there already are kept, so
that an interrupted study continues.
"""

import csv
import io
import json
import math
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.measuring import environment, write
from firstsight.core import params, yaml12
from firstsight.core.stage import log, main
from firstsight.evaluation.answer_limit import answer_limit
from firstsight.evaluation.metrics import score
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.records.parquet import Split, SplitWriter
from firstsight.records.sample import Sample
from firstsight.reporting import text_table
from stages import build_egoqa_dataset, cache_teacher_targets, cache_visual_tokens, distill, finetune_student

ROOT, RESULTS, PICTURE = Path.cwd(), Path(__file__).parent / "pays.csv", Path(__file__).parent / "pays.png"
LINKED = ("presets", "data/example.jsonl", "models/student", "models/teacher-finetuned")
SHARES, NOISES = (0.02, 0.05, 0.2, 1.0), (0.2, 0.4)
TEMPERATURES, ALPHAS = (1.0, 2.0, 4.0), (0.5, 0.9, 1.0)
# The 0.975 quantile of Student's t distribution, by the number of seeds.
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
LABELS, ANSWERS, DISTRIBUTIONS = "labels", "teacher's answers", "teacher's distributions"
# Models that learn nothing, for comparison, and their folders.
UNTRAINED = {"the teacher itself": cache_teacher_targets.TEACHER, "the student before": Path("models/student")}


@dataclass(frozen=True)
class Arm:
    """Describe what a student learns from: `share` of the scenes labelled, `noise` of the labels wrong, a quarter of
    each of a share `occluded` of the pictures hidden."""

    share: float
    noise: float
    occluded: float
    learns_from: str
    temperature: float | None = None
    alpha: float | None = None


def arms(settings: params.Params) -> list[list[Arm]]:
    """Return all arms, in groups that share their data: first those that say whether the default pays."""
    own, point = settings.data.labelled_fraction, (settings.train.temperature, settings.train.alpha)

    def untrained(occluded: float) -> list[Arm]:
        return [Arm(own, 0.0, occluded, name) for name in UNTRAINED]

    def trained(share: float, occluded: float = 0.0) -> list[Arm]:
        # Where all scenes are labelled, the teacher is asked nothing.
        answers = [Arm(share, 0.0, occluded, ANSWERS)] if share < 1 else []
        return [Arm(share, 0.0, occluded, LABELS), *answers, Arm(share, 0.0, occluded, DISTRIBUTIONS, *point)]

    shares = [trained(share) for share in SHARES if share != own]
    grid = [Arm(own, 0.0, 0.0, DISTRIBUTIONS, t, a) for t in TEMPERATURES for a in ALPHAS if (t, a) != point]
    noisy = [[Arm(1.0, noise, 0.0, LABELS), Arm(1.0, noise, 0.0, DISTRIBUTIONS, *point)] for noise in NOISES]
    return [[*untrained(0.0), *trained(own)], *shares, grid, *noisy, [*untrained(1.0), *trained(own, 1.0)]]


def run() -> None:
    if sys.argv[1:] == ["table"]:
        show(read())
        return
    settings = params.load()
    device = pick_device(settings.runtime.device)
    rows = read() if RESULTS.exists() else []
    done = {identity(row) for row in rows}
    for group in arms(settings):
        for seed in [int(seed) for seed in sys.argv[1:]] or range(5):
            wanted = [arm for arm in group if identity(asdict(arm) | {"seed": seed}) not in done]
            for row in students(settings, seed, wanted, device) if wanted else ():
                rows.append(row)
                write(RESULTS.stem, rows)
    show(rows)


def identity(row: dict) -> tuple[str, ...]:
    """Return what tells a student from the others, as the CSV file has it."""
    names = ("seed", "share", "noise", "occluded", "learns_from", "temperature", "alpha")
    return tuple("" if row[name] in (None, "") else f"{row[name]}" for name in names)


def read() -> list[dict[str, str]]:
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def students(settings: params.Params, seed: int, wanted: list[Arm], device: str) -> Iterator[dict]:
    """Build the data that the arms share, then train and score their students."""
    share, noise, occluded = wanted[0].share, wanted[0].noise, wanted[0].occluded
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in LINKED:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(ROOT / path)
        values = settings.model_dump()
        values["data"] |= {"seed": seed, "labelled_fraction": share, "unanswered": "teacher"}
        values["train"]["seed"] = seed
        values["control"]["enabled"] = True
        with chdir(folder):
            save(values)
            build_egoqa_dataset.run()
            if noise:
                mislabel(Path("data/egoqa/train.parquet"), noise, seed)
            if occluded:
                for path in Path("data/egoqa").glob("*.parquet"):
                    occlude(path, occluded, seed)
            if any(arm.learns_from not in UNTRAINED for arm in wanted):
                cache_teacher_targets.run()
                cache_visual_tokens.run()
            for arm in wanted:
                started = time.perf_counter()
                model = UNTRAINED.get(arm.learns_from) or student(values, arm)
                row = {
                    "seed": seed,
                    **asdict(arm),
                    "exact_match": round(exact_match(model, settings.evaluate, device), 4),
                    "steps": 0 if arm.learns_from in UNTRAINED else last_step(model),
                    "seconds": round(time.perf_counter() - started),
                    **environment(device),
                }
                log.info("seed %d, %s: exact match %.3f", seed, arm, row["exact_match"])
                yield row


def student(values: dict, arm: Arm) -> Path:
    """Train the student of an arm in the current folder; return its model's folder."""
    if arm.learns_from == DISTRIBUTIONS:
        values["train"] |= {"temperature": arm.temperature, "alpha": arm.alpha}
        save(values)
        distill.run()
        return distill.OUTPUT
    values["control"]["answers"] = "labels" if arm.learns_from == LABELS else "teacher"
    save(values)
    finetune_student.run()
    return finetune_student.OUTPUT


def last_step(model: Path) -> int:
    return json.loads((model / "history.json").read_text(encoding="utf-8"))[-1]["step"]


def save(values: dict) -> None:
    Path("params.yaml").write_text(yaml12.dump(values), encoding="utf-8")


def mislabel(path: Path, noise: float, seed: int) -> None:
    """Replace a share of a split's labels by another answer that the same question has elsewhere in the split."""
    samples = list(Split(path))
    given = defaultdict(set)
    for sample in samples:
        for record in sample.records:
            given[record.question, record.options].add(record.answer)
    rng = random.Random(seed)
    with SplitWriter(path.with_suffix(".noisy")) as writer:
        for sample in samples:
            records = []
            for record in sample.records:
                others = sorted(given[record.question, record.options] - {record.answer})
                if others and rng.random() < noise:
                    wrong = rng.choice(others)
                    record = replace(record, answer=wrong, answers=(wrong,))
                records.append(record)
            writer.write(replace(sample, records=tuple(records)))
    path.with_suffix(".noisy").replace(path)


def occlude(path: Path, share: float, seed: int) -> None:
    """Hide a quarter of the picture behind a grey patch in a share of a split's samples, in all frames of one alike."""
    rng = random.Random(f"{path.name} {seed}")
    with SplitWriter(path.with_suffix(".occluded")) as writer:
        for sample in Split(path):
            writer.write(hide_quarter(sample, rng) if rng.random() < share else sample)
    path.with_suffix(".occluded").replace(path)


def hide_quarter(sample: Sample, rng: random.Random) -> Sample:
    across, down = rng.random(), rng.random()
    frames = []
    for image in sample.images():
        width, height = image.size
        left, top = round(across * width / 2), round(down * height / 2)
        image.paste((128, 128, 128), (left, top, left + width // 2, top + height // 2))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        frames.append(buffer.getvalue())
    return replace(sample, frames=tuple(frames))


def exact_match(folder: Path, settings: params.Evaluate, device: str) -> float:
    """Return the share of the test questions that the model in `folder` answers exactly."""
    questions = [(sample, record) for sample in Split(Path("data/egoqa/test.parquet")) for record in sample.records]
    model = PyTorchModel(load_model(folder, settings.precision, device), load_processor(folder), settings.precision)
    limit = answer_limit(model.token_counts, [record for _, record in questions], settings.max_new_tokens)
    given = model.answers(questions, settings.batch_size, limit)
    return float(np.mean([score(record, text).exact_match for (_, record), text in zip(questions, given, strict=True)]))


def show(rows: list[dict]) -> None:
    """Print the mean over seeds of each arm with its 95% interval, and draw exact match over the share of labels."""
    by_arm = defaultdict(list)
    for row in rows:
        by_arm[identity(row | {"seed": ""})[1:]].append(float(row["exact_match"]))
    means = {arm: interval(found) for arm, found in by_arm.items()}
    cells = [
        (
            f"{float(arm[0]):.0%}",
            f"{float(arm[1]):.0%}",
            f"{float(arm[2]):.0%}",
            *arm[3:],
            f"{mean:.3f}",
            f"{low:.3f} to {high:.3f}" if n > 1 else "-",
            str(n),
        )
        for arm, (mean, low, high, n) in sorted(means.items())
    ]
    header = ("labelled", "wrong", "occluded", "learns from", "T", "alpha", "exact match", "95% over seeds", "seeds")
    print(text_table.render([header, *cells], left=4))
    settings = params.load().train
    own = {LABELS: ("", ""), ANSWERS: ("", ""), DISTRIBUTIONS: (str(settings.temperature), str(settings.alpha))}
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (learns_from, point), colour in zip(own.items(), ("#888888", "#0072B2", "#D55E00"), strict=True):
        line = sorted((float(a[0]), *means[a]) for a in means if a[1:] == ("0.0", "0.0", learns_from, *point))
        if line:
            shares, mean, low, high, _ = map(np.array, zip(*line, strict=True))
            label = f"{learns_from}, T = {point[0]}, α = {point[1]}" if point[0] else learns_from
            axis.errorbar(shares, mean, (mean - low, high - mean), color=colour, marker="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="share of scenes that are labelled", ylabel="exact match of the student")
    axis.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(PICTURE, dpi=110)


def interval(found: list[float]) -> tuple[float, float, float, int]:
    """Return the mean over seeds, the ends of its 95% interval by Student's t, and the number of seeds."""
    mean = float(np.mean(found))
    half = QUANTILE[len(found)] * float(np.std(found, ddof=1)) / len(found) ** 0.5 if len(found) > 1 else math.nan
    return mean, mean - half, mean + half, len(found)


if __name__ == "__main__":
    main(run)

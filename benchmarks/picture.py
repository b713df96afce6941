"""Draw benchmarks/*.csv as benchmarks/distillation.png: what the loss, the step and a sweep cost.

python -m benchmarks.picture
"""

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from firstsight.core.stage import log, main

FOLDER = Path(__file__).parent
OURS, OTHERS = "#1b6ca8", "#b9c4cc"


def read(name: str) -> list[dict[str, str]]:
    path = FOLDER / f"{name}.csv"
    return list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []


def bars(axes, labels: list[str], values: list[float], ours: set[str], title: str, unit: str) -> None:
    axes.barh(labels, values, color=[OURS if label in ours else OTHERS for label in labels])
    for place, value in enumerate(values):
        axes.annotate(f" {value:,.{0 if value >= 100 else 1}f} {unit}", (value, place), va="center", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, 1.3 * max(values))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def run() -> None:
    device = "cuda" if read("loss-cuda") else "cpu"
    loss, step, sweep = read(f"loss-{device}"), read(f"distill-step-{device}"), read("sweep")
    most = max(int(row["answer_tokens"]) for row in loss)
    loss = [row for row in loss if int(row["answer_tokens"]) == most]
    totals: dict[str, float] = defaultdict(float)
    for row in sweep:
        totals[row["targets"]] += float(row["seconds"]) / 60

    figure, grid = plt.subplots(2, 2, figsize=(10, 4.6), layout="constrained")
    axes = grid.flat
    names = [row["implementation"] for row in loss]
    title = f"Loss and gradients, {most:,} answer tokens"
    bars(axes[0], names, [float(row["seconds"]) for row in loss], {"FirstSight"}, f"{title}: time", "s")
    bars(axes[1], names, [float(row["memory_mb"]) for row in loss], {"FirstSight"}, f"{title}: memory", "MB")
    cases = [f"{row['student']}: {row['teacher']}" for row in step]
    cached = {f"{row['student']}: cached" for row in step}
    bars(
        axes[2], cases, [float(row["seconds"]) for row in step], cached, "A training step, by student and teacher", "s"
    )
    bars(axes[3], list(totals), list(totals.values()), {"hidden"}, "Six (T, alpha) points, by targets", "min")
    figure.supxlabel(f"{loss[0]['device']}, torch {loss[0]['torch']}", fontsize=8)
    figure.savefig(FOLDER / "distillation.png", dpi=110)
    log.info("wrote %s", FOLDER / "distillation.png")


if __name__ == "__main__":
    main(run)

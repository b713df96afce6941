"""Plot time and memory of the loss, a training step and a sweep on the CPU as benchmarks/distillation.png.

python -m benchmarks.picture
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from firstsight.core.stage import log, main

FOLDER = Path(__file__).parent
OURS, OTHERS = "#1b6ca8", "#b9c4cc"


def bars(axes, labels: Sequence[str], values: Sequence[float], ours: set[str], title: str, unit: str) -> None:
    """Draw labelled horizontal bars; those whose labels are in `ours` have another colour."""
    axes.barh(labels, values, color=[OURS if label in ours else OTHERS for label in labels])
    for place, value in enumerate(values):
        axes.annotate(f" {value:,.{0 if value >= 100 else 1}f} {unit}", (value, place), va="center", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(0, 1.3 * max(values))
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def run() -> None:
    # Of one machine: the sweep was measured on the CPU.
    loss, step, sweep = (pd.read_csv(FOLDER / f"{name}.csv") for name in ("loss-cpu", "distill-step-cpu", "sweep"))
    most = loss["answer_tokens"].max()
    loss = loss[loss["answer_tokens"] == most]
    minutes = sweep.groupby("targets")["seconds"].sum() / 60
    # Cases of other bodies and numbers of samples are left to the CSV file.
    step = step[(step["body"] == "transformers") & (step["samples"] == step["samples"].min())]
    seen = step["visual_tokens"].map({"computed": "", "cached": ", visual tokens too"})
    cases = step["student"] + ": " + step["teacher"] + seen

    figure, grid = plt.subplots(2, 2, figsize=(10, 4.6), layout="constrained")
    axes = grid.flat
    title = f"Loss, {most:,} answer tokens"
    for axis, column, label, unit in ((axes[0], "seconds", "time", "s"), (axes[1], "memory_mb", "memory", "MB")):
        bars(axis, loss["implementation"], loss[column], {"FirstSight"}, f"{title}: {label}", unit)
    cached = set(cases[step["teacher"] == "cached"])
    bars(axes[2], cases, step["seconds"], cached, "A training step, by student and teacher", "s")
    bars(axes[3], minutes.index, minutes, {"hidden"}, "Six (T, alpha) points, by targets", "min")
    figure.supxlabel(f"{loss['device'].iloc[0]}, torch {loss['torch'].iloc[0]}", fontsize=8)
    figure.savefig(FOLDER / "distillation.png", dpi=110)
    log.info("wrote %s", FOLDER / "distillation.png")


if __name__ == "__main__":
    main(run)

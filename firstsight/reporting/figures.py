"""The report's pictures, as PNG: legible without colour (markers, hatches and labels say the same)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from firstsight.reporting.summary import VARIANTS

# Okabe and Ito's palette, told apart with any colour vision.
# A dollar sign in a question type is no formula.
plt.rcParams["text.parse_math"] = False
_COLOURS = dict(zip(VARIANTS, ("#0072B2", "#999999", "#D55E00", "#009E73"), strict=True))
_MARKERS = dict(zip(VARIANTS, "sXoD", strict=True))


def training(curves: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Training and validation loss by step, one panel a training stage; a stage that did not train has none."""
    curves = {stage: splits for stage, splits in curves.items() if any(splits.values())}
    figure, axes = plt.subplots(1, len(curves), figsize=(4.6 * len(curves), 3.4), squeeze=False, layout="constrained")
    for axis, (title, splits) in zip(axes[0], curves.items(), strict=True):
        for split, style in (
            ("train", {"alpha": 0.6, "color": "#0072B2"}),
            ("validation", {"marker": "o", "color": "#D55E00"}),
        ):
            if splits[split]:
                axis.plot(*zip(*splits[split], strict=True), label=split, **style)
        axis.set(title=title, xlabel="optimizer step", ylabel="loss a token (log scale)", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def quality(table: dict[str, dict[str, float]], path: Path) -> None:
    """Exact match by variant with 95% intervals, and the question-only baseline as a line."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for place, variant in enumerate(VARIANTS):
        row = table[variant]
        error = [[row["exact_match"] - row["exact_match_low"]], [row["exact_match_high"] - row["exact_match"]]]
        axis.barh(place, row["exact_match"], xerr=error, color=_COLOURS[variant], capsize=4, height=0.6)
        axis.text(row["exact_match_high"] + 0.015, place, f"{row['exact_match']:.3f}", va="center")
    axis.axvline(
        table["question-only"]["exact_match"], color="black", linestyle="--", label="best guess without looking"
    )
    axis.set(
        yticks=range(len(VARIANTS)),
        yticklabels=VARIANTS,
        xlim=(0, 1.12),
        xlabel="exact match on the test split, with 95% interval",
    )
    axis.invert_yaxis()
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _save(figure, path)


def quality_against_cost(quality_rows: dict, performance_rows: dict, path: Path) -> None:
    """Exact match against latency and against size on disk: up and to the left is better."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), sharey=True, layout="constrained")
    costs = (("latency_ms_p50", 1, "milliseconds an answer (p50, batch 1)"), ("disk_bytes", 1e6, "megabytes on disk"))
    for axis, (cost, unit, label) in zip(axes, costs, strict=True):
        for variant in VARIANTS:
            axis.scatter(
                performance_rows[variant][cost] / unit,
                quality_rows[variant]["exact_match"],
                s=80,
                color=_COLOURS[variant],
                marker=_MARKERS[variant],
                label=variant,
            )
        axis.set(xlabel=label, ylim=(-0.03, 1.03))
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact match")
    axes[1].legend(loc="center right")
    _save(figure, path)


def by_type(quality_by_variant: dict[str, dict], path: Path) -> None:
    """Exact match by question type, one group of bars a type."""
    kinds = sorted({kind for row in quality_by_variant.values() for kind in row["exact_match_by_type"]})
    figure, axis = plt.subplots(figsize=(7.2, 0.62 * len(kinds) + 1.2), layout="constrained")
    for number, variant in enumerate(VARIANTS):
        values = [quality_by_variant[variant]["exact_match_by_type"].get(kind, 0) for kind in kinds]
        places = [place + 0.2 * (number - 1.5) for place in range(len(kinds))]
        axis.barh(
            places, values, height=0.19, color=_COLOURS[variant], label=variant, hatch=("", "..", "", "//")[number]
        )
    axis.set(yticks=range(len(kinds)), yticklabels=kinds, xlim=(0, 1), xlabel="exact match")
    axis.invert_yaxis()
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    # No date in the file: equal figures, equal bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)

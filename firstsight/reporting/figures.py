"""Draw the report's figures as PNG, readable without colour: markers, positions and labels say the same."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from firstsight.core.variants import VARIANTS
from firstsight.reporting import fonts
from firstsight.reporting.measure import TEXTS, Measure, measure_of
from firstsight.reporting.summary import QUESTION_ONLY, before_and_after

# A dollar sign in a question type does not start a formula.
plt.rcParams["text.parse_math"] = False
plt.rcParams["font.family"] = fonts.families()
# As wide as a phone shows a figure, two of them side by side on a desktop, in inches; panels are below each other.
_WIDTH, plt.rcParams["font.size"] = 4.4, 9
# The palette of Okabe and Ito, distinguishable with any colour vision; darker tones are of exports.
_PALETTE = (
    *("#0072B2", "#56B4E9", "#CC79A7", "#9467BD", "#003D66", "#888888", "#000000", "#D55E00", "#009E73", "#E69F00"),
    *("#66A61E", "#7A2E00", "#00543A", "#8A5A00"),
)
_COLOURS = dict(zip(VARIANTS, _PALETTE, strict=True))
# Most question types shown: more do not fit a page, or the first screen of it.
_TYPES_SHOWN, _TYPES_FIRST = 24, 10
# Of kinds of layers.
_KINDS = ("#0072B2", "#56B4E9", "#CC79A7", "#003D66", "#888888", "#000000", "#D55E00", "#009E73")
_MARKERS = dict(zip(VARIANTS, "sPvHpXhoD^>d<*", strict=True))


def training(curves: dict[str, dict[str, pd.DataFrame]], path: Path) -> None:
    """Plot training and validation loss by step, one panel per training stage; a stage that did not train has none."""
    curves = {stage: splits for stage, splits in curves.items() if any(map(len, splits.values()))}
    figure, axes = _panels(len(curves), 2.6)
    for axis, (title, splits) in zip(axes, curves.items(), strict=True):
        for split, style in (
            ("train", {"alpha": 0.6, "color": "#0072B2"}),
            ("validation", {"marker": "o", "color": "#D55E00"}),
        ):
            if len(splits[split]):
                axis.plot("step", "loss", data=splits[split], label=split, **style)
        axis.set(title=title, xlabel="optimizer step", ylabel="loss a token (log scale)", yscale="log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else ""))
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def gain(table: dict[str, dict[str, Any]], types: pd.DataFrame, path: Path) -> None:
    """Plot what training added to exact match, with 95% intervals: overall and by question type.

    The commonest types are shown, and beside each the exact match of the two variants that are compared
    (`summary.before_and_after`).

    Args:
        table: metrics/quality.json, with both variants.
        types: as `summary.by_type` returns it.
    """
    reference, trained = before_and_after(table)
    gains = pd.DataFrame(table[trained]["gain_by_type"]).T.sort_values("questions", ascending=False, kind="stable")
    gains = gains[:_TYPES_FIRST].sort_values("gain", ascending=False, kind="stable")
    shares = types.pivot(index="type", columns="variant", values="exact_match")
    shares.loc["all"] = {name: table[name]["exact_match"] for name in shares}
    gains = pd.concat([pd.DataFrame([table[trained]], index=["all"])[gains.columns], gains])
    figure, axis = plt.subplots(figsize=(_WIDTH, 0.23 * len(gains) + 0.75), layout="constrained")
    for place, (kind, row) in enumerate(gains.iterrows()):
        ends = [[max(0, row["gain"] - row["gain_low"])], [max(0, row["gain_high"] - row["gain"])]]
        axis.errorbar(
            100 * row["gain"],
            place,
            xerr=100 * np.array(ends),
            color=_COLOURS[trained] if place else "black",
            marker="o" if place else "D",
            capsize=3,
        )
        before, after = shares.loc[kind, [reference, trained]]
        text = f"{100 * before:.0f} → {100 * after:.0f}%"
        axis.text(1.02, place, text, va="center", transform=axis.get_yaxis_transform())
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axhline(0.5, color="#dddddd", linewidth=0.8)
    axis.set(
        yticks=range(len(gains)),
        yticklabels=[f"{_label(str(kind))} ({row['questions']:.0f})" for kind, row in gains.iterrows()],
        xlabel=f"points of exact match over {reference}",
    )
    axis.grid(axis="x", alpha=0.3)
    axis.invert_yaxis()
    _save(figure, path)


def quality(table: dict[str, dict[str, float]], variants: Sequence[str], path: Path) -> None:
    """Plot exact match by variant with 95% intervals, and the question-only baseline as a line; perplexity of texts."""
    measure = measure_of(table)
    figure, axis = plt.subplots(figsize=(_WIDTH, 0.3 * len(variants) + 1.1), layout="constrained")
    highest = 1.0 if measure is not TEXTS else max(table[variant][f"{measure.name}_high"] for variant in variants)
    for place, variant in enumerate(variants):
        row = table[variant]
        axis.barh(place, row[measure.name], xerr=_error(row, measure), color=_COLOURS[variant], capsize=4, height=0.6)
        text = f"{row[measure.name]:.1f}" if measure is TEXTS else f"{row[measure.name]:.3f}"
        axis.text(row[f"{measure.name}_high"] + 0.02 * highest, place, text, va="center")
    if measure is not TEXTS:
        guess = table[QUESTION_ONLY]["exact_match"]
        axis.axvline(guess, color="black", linestyle="--", label="best guess without looking")
    better = "; lower is better" if measure is TEXTS else ""
    axis.set(
        yticks=range(len(variants)),
        yticklabels=variants,
        xlim=(0, 1.2 * highest),
        xlabel=f"{measure.label} on the test split, with 95% interval{better}",
    )
    axis.invert_yaxis()
    if measure is not TEXTS:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _save(figure, path)


def quality_against_cost(quality_rows: dict, performance_rows: dict, path: Path) -> None:
    """Plot exact match with its interval against latency and against peak memory: up and to the left is better.

    Of texts, it is perplexity: down and to the left is better.
    """
    measure = measure_of(quality_rows)
    figure, axes = _panels(2, 2.4, legend=len(performance_rows))
    costs = (
        ("latency_ms_p50", 1, "milliseconds an answer (p50, batch 1)"),
        ("peak_bytes", 1e6, "megabytes of memory at most (batch 1)"),
    )
    for axis, (cost, unit, label) in zip(axes, costs, strict=True):
        for variant, row in performance_rows.items():
            axis.errorbar(
                row[cost] / unit,
                quality_rows[variant][measure.name],
                yerr=_error(quality_rows[variant], measure),
                color=_COLOURS[variant],
                marker=_MARKERS[variant],
                markersize=9,
                capsize=3,
                linestyle="none",
                label=variant,
            )
        axis.set(xlabel=label, ylabel=measure.label, ylim=(0, None) if measure is TEXTS else (-0.03, 1.03))
        axis.set_xlim(0, 1.08 * max(row[cost] for row in performance_rows.values()) / unit)
        axis.grid(alpha=0.3)
    _legend(figure, axes[0], 2)
    _save(figure, path)


def by_type(table: pd.DataFrame, path: Path) -> None:
    """Plot exact match with its interval by variant and question type, for the most frequent types.

    `table` is as `summary.by_type` returns it.
    """
    counts = table.drop_duplicates("type").set_index("type")["questions"]
    kinds = counts.sort_values(ascending=False, kind="stable")[:_TYPES_SHOWN].sort_index()
    variants = table["variant"].unique()
    height = (0.11 * len(variants) + 0.1) * len(kinds) + 0.6
    figure, (axis,) = _panels(1, height, legend=len(variants))
    for number, variant in enumerate(variants):
        own = table[table["variant"] == variant].set_index("type")
        for place, kind in enumerate(kinds.index):
            if kind not in own.index:
                continue
            right, low, high = own.loc[kind, ["exact_match", "low", "high"]]
            axis.errorbar(
                right,
                place + 0.8 * ((number + 0.5) / len(variants) - 0.5),
                xerr=[[max(0, right - low)], [max(0, high - right)]],
                color=_COLOURS[variant],
                marker=_MARKERS[variant],
                markersize=4,
                capsize=1.5,
                linestyle="none",
                label=variant if place == 0 else None,
            )
    for place in range(1, len(kinds)):
        axis.axhline(place - 0.5, color="#dddddd", linewidth=0.8)
    axis.set(
        yticks=range(len(kinds)),
        yticklabels=[f"{_label(kind)} ({count})" for kind, count in kinds.items()],
        xlim=(-0.02, 1.02),
        xlabel="exact match, with 95% interval",
    )
    axis.grid(axis="x", alpha=0.3)
    axis.invert_yaxis()
    _legend(figure, axis, 2)
    _save(figure, path)


def confusion(matrices: dict[str, np.ndarray], classes: Sequence[str], path: Path) -> None:
    """Plot the confusion matrix [C, C] of each variant, one panel a variant: a row for each true class.

    The shade of a cell is its share of the row; up to 20 classes, its count is in it.
    """
    side = 0.5 + max(2.6, 0.24 * len(classes))
    figure, axes = _panels(len(matrices), side)
    for axis, (variant, counts) in zip(axes, matrices.items(), strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (true, predicted), count in np.ndenumerate(counts) if len(classes) <= 20 else ():
            if count:
                colour = "white" if shares[true, predicted] > 0.5 else "black"
                axis.text(predicted, true, str(count), ha="center", va="center", fontsize=6, color=colour)
        names = [_label(name) for name in classes]
        axis.set(title=variant, xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
        axis.set_xticklabels(names, rotation=90, fontsize=7)
        axis.set_yticklabels(names, fontsize=7)
    _save(figure, path)


def throughput(performance_rows: dict, path: Path) -> None:
    """Plot answers per second by batch size."""
    figure, (axis,) = _panels(1, 2.8, legend=len(performance_rows))
    for variant, row in performance_rows.items():
        points = [(1, 1000 / row["latency_ms_p50"])]
        points += [(int(batch), found["answers_per_second"]) for batch, found in row["throughput"].items()]
        axis.plot(*zip(*points, strict=True), color=_COLOURS[variant], marker=_MARKERS[variant], label=variant)
    axis.set(xlabel="questions at once", ylabel="answers a second", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(alpha=0.3)
    _legend(figure, axis, 2)
    _save(figure, path)


def quantization(errors: dict[str, dict[str, float]], path: Path) -> None:
    """Plot the relative error of each quantized layer by its block and kind, one panel per method."""
    figure, axes = _panels(len(errors), 2.3, legend=4)
    for axis, (method, layers) in zip(axes, errors.items(), strict=True):
        # ...{block}.{attention or mlp}.{kind}
        named = [(*name.rsplit(".", 3)[1:], error) for name, error in layers.items()]
        kinds = list(dict.fromkeys((part, kind) for _, part, kind, _ in named))
        for (part, kind), marker, colour in zip(kinds, "sPvXhoD^", _KINDS, strict=False):
            points = [(int(block), error) for block, *where, error in named if where == [part, kind]]
            # GPT-2 has a c_proj in both parts of a block.
            label = kind if [one for _, one in kinds].count(kind) == 1 else f"{part} {kind}"
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=0.8, label=label)
        axis.set(title=method, xlabel="block of the language model", ylabel="error / layer's output", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    _legend(figure, axes[0], 4)
    _save(figure, path)


def _panels(count: int, height: float, legend: int = 0) -> tuple[plt.Figure, Sequence[plt.Axes]]:
    """Return a figure of `count` panels below each other, each `height` inches, with room for a legend's entries."""
    size = _WIDTH, count * height + 0.12 * legend
    figure, axes = plt.subplots(count, 1, figsize=size, squeeze=False, layout="constrained")
    return figure, list(axes[:, 0])


def _legend(figure: plt.Figure, axis: plt.Axes, columns: int) -> None:
    """Put the legend of the axis below all panels, which then have the whole width."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _label(kind: str) -> str:
    """Return a question type as one short line."""
    line = fonts.drawable(" ".join(kind.split()))
    return line if len(line) <= 40 else f"{line[:39]}…"


def _error(row: dict[str, float], measure: Measure) -> list[list[float]]:
    """Return the error bar of the measure for matplotlib; rounding can put a mean just outside its interval."""
    middle, low, high = (row[measure.name + end] for end in ("", "_low", "_high"))
    return [[max(0, middle - low)], [max(0, high - middle)]]


def _save(figure: plt.Figure, path: Path) -> None:
    """Save as a PNG of 128 colours: no visible difference at half the size, because the files are in git."""
    with io.BytesIO() as drawn:
        figure.savefig(drawn, format="png", dpi=200)
        picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    plt.close(figure)
    # Without software version and date, so that equal figures give equal bytes.
    picture.save(path, optimize=True)

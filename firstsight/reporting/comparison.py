"""The comparison table for a terminal, from the git-tracked metrics, or of some variants as they were measured."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.variants import LEFT_OUT, VARIANTS
from firstsight.reporting.summary import BASELINES, before_and_after
from firstsight.reporting.text_table import render, size

METRICS = Path("metrics")
HEADER = (
    "variant",
    "exact match",
    "gain",
    "F1",
    "retention",
    "parameters",
    "on disk",
    "peak memory",
    "latency",
    "answers/s",
)

# Of these, those that the report opens with, which a phone has room for.
FIRST = ("variant", "exact match", "gain", "weights", "latency")


def first_rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Return the cells of the table that the report opens with, in the order of `FIRST`; a row as in `rows`."""
    table: list[tuple[str, ...]] = [
        (
            variant,
            f"{quality[variant]['exact_match']:.1%}",
            f"{100 * quality[variant]['gain']:+.1f}" if "gain" in quality[variant] else "",
            size(fast["weights_bytes"]),
            f"{fast['latency_ms_p50']:.1f} ms",
        )
        for variant, fast in performance.items()
    ]
    return table + [(_words(name), f"{quality[name]['exact_match']:.1%}", "", "", "") for name in BASELINES]


def rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Return the table's cells in the order of `HEADER`: one row per variant, then one per baseline.

    Where answers are classes, F1 is macro-F1.
    """
    table: list[tuple[str, ...]] = []
    for variant, fast in performance.items():
        good = quality[variant]
        together = [batch["answers_per_second"] for batch in fast["throughput"].values()]
        table.append(
            (
                variant,
                f"{good['exact_match']:.3f} ({good['exact_match_low']:.2f}-{good['exact_match_high']:.2f})",
                f"{good['gain']:+.3f}" if "gain" in good else "-",
                f"{good.get('macro_f1', good['f1']):.3f}",
                f"{good['retention']:.1%}" if "retention" in good else "-",
                size(fast["parameters"], ""),
                size(fast["disk_bytes"]),
                size(fast["peak_bytes"]),
                f"{fast['latency_ms_p50']:.1f} ms",
                f"{max(together):.1f}" if together else "-",
            )
        )
    for name in BASELINES:
        if name in quality:
            cells = (_words(name), f"{quality[name]['exact_match']:.3f}")
            table.append(cells + ("",) * (len(HEADER) - len(cells)))
    return table


def _words(baseline: str) -> str:
    return baseline.replace("-", " ")


def show_some(names: list[str]) -> None:
    """Print the table of the named variants as `evaluate` measured them, without the report.

    Raises:
        UserError: a name is no variant, or its figures are missing or left out.
    """
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"{unknown[0]}: expected a variant, one of {', '.join(VARIANTS)}")
    for name in names:
        if (note := Path("evaluations") / name / LEFT_OUT).exists():
            raise UserError(
                f"{note.parent}: expected figures, found that it is left out: {read_json(note, 'evaluate')}"
            )
    found = {
        table: {name: read_json(Path("evaluations") / name / f"{table}.json", f"evaluate@{name}") for name in names}
        for table in ("quality", "performance")
    }
    # Only the report computes gain and retention, from all answers. The memory of weights is shown instead: it is what
    # differs between copies of one model that are quantized on loading.
    weights = ["weights", *(size(row["weights_bytes"]) for row in found["performance"].values())]
    cells = [HEADER, *rows(found["quality"], found["performance"])]
    shown = [dict(zip(HEADER, row, strict=True)) | {"retention": own} for row, own in zip(cells, weights, strict=True)]
    print(render([[row[name] for name in HEADER if name != "gain"] for row in shown]))


def show() -> None:
    """Print the table of all variants in metrics/, and where to find more.

    Raises:
        UserError: figures are missing, or of another version.
    """
    quality, performance = (read_json(METRICS / f"{table}.json", "report") for table in ("quality", "performance"))
    try:
        print(render([HEADER, *rows(quality, performance)]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{METRICS}: expected figures of this version, found no {error}; run dvc repro") from None
    try:
        summary = (METRICS / "summary.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{METRICS}/summary.txt: expected a summary, found {error}; run dvc repro report") from None
    opening, *_ = summary.split("\n\n")
    reference, _ = before_and_after(quality)
    print(
        f"\n{opening}\n\nexact match with its 95% interval, gain over that of {reference}; without looking at\n"
        "the image, question only is the best guess, majority answer the commonest answer to whatever is asked\n"
    )
    print(
        "report   metrics/report.html\nsummary  metrics/summary.txt\nplots    metrics/plots/*.png, or: dvc plots show\n"
        "models   " + ", ".join(str(VARIANTS[name].model) for name in performance if name.startswith("student-"))
    )

"""The comparison table for a terminal, from the git-tracked metrics, or of some variants as they were measured."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.variants import LEFT_OUT, VARIANTS
from firstsight.reporting.summary import MAJORITY, QUESTION_ONLY
from firstsight.reporting.text_table import render

METRICS = Path("metrics")
HEADER = ("variant", "exact match", "F1", "retention", "parameters", "on disk", "peak memory", "latency", "answers/s")


def size(count: float, unit: str = "B") -> str:
    """Return a count with a decimal prefix and at most three digits: 1234567 gives "1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 999.5 or prefix == "G":
            return f"{count:.3g} {prefix}{unit}".rstrip()
        count /= 1000
    raise AssertionError


def rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Return the table's cells in the order of `HEADER`: one row per variant, then one per baseline."""
    table: list[tuple[str, ...]] = []
    for variant, fast in performance.items():
        good = quality[variant]
        together = [batch["answers_per_second"] for batch in fast["throughput"].values()]
        table.append(
            (
                variant,
                f"{good['exact_match']:.3f} ({good['exact_match_low']:.2f}-{good['exact_match_high']:.2f})",
                f"{good['f1']:.3f}",
                f"{good['retention']:.1%}" if "retention" in good else "-",
                size(fast["parameters"], ""),
                size(fast["disk_bytes"]),
                size(fast["peak_bytes"]),
                f"{fast['latency_ms_p50']:.1f} ms",
                f"{max(together):.1f}" if together else "-",
            )
        )
    for name in (QUESTION_ONLY, MAJORITY):
        if name in quality:
            cells = (name.replace("-", " "), f"{quality[name]['exact_match']:.3f}")
            table.append(cells + ("",) * (len(HEADER) - len(cells)))
    return table


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
    # Only the report computes retention, from all answers. The memory of weights is shown instead: it is what differs
    # between copies of one model that are quantized on loading.
    place = HEADER.index("retention")
    weights = ["weights", *(size(row["weights_bytes"]) for row in found["performance"].values())]
    cells = [HEADER, *rows(found["quality"], found["performance"])]
    print(render([(*row[:place], own, *row[place + 1 :]) for row, own in zip(cells, weights, strict=True)]))


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
    print(
        "\nexact match with its 95% interval; without looking at the image, question only is the best guess,\n"
        "majority answer the commonest answer to whatever is asked\n"
    )
    print(
        "report   metrics/report.html\nsummary  metrics/summary.txt\nplots    metrics/plots/*.png, or: dvc plots show\n"
        "models   " + ", ".join(str(VARIANTS[name].model) for name in performance if name.startswith("student-"))
    )

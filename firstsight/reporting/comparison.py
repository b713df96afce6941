"""The comparison table for a terminal, from the git-tracked metrics, or of some variants as they were measured."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.variants import LEFT_OUT, VARIANTS
from firstsight.reporting.measure import TEXTS, Measure, measure_of
from firstsight.reporting.summary import BASELINES, before_and_after
from firstsight.reporting.text_table import render, size

METRICS = Path("metrics")
COSTS = ("parameters", "on disk", "peak memory", "latency", "answers/s")


def header(quality: dict) -> tuple[str, ...]:
    """Return the names of the table's columns; those of quality depend on the kind of records."""
    measure = measure_of(quality)
    last = ("retention",)
    if measure is TEXTS:
        last = ("ROUGE-L",) if _are_continued(quality) else ()
    return ("variant", measure.label, measure.gain_label, measure.beside_label, *last, *COSTS)


def _are_continued(quality: dict) -> bool:
    """Return whether the records are texts of which some are continued."""
    return measure_of(quality) is TEXTS and any("rouge_l" in row for row in quality.values())


def first_header(quality: dict) -> tuple[str, ...]:
    """Return those of the columns that the report opens with, which a phone has room for."""
    measure = measure_of(quality)
    return ("variant", measure.label, measure.gain_label, "weights", "latency")


def first_rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Return the cells of the table that the report opens with, in the order of `first_header`; a row as in `rows`."""
    measure = measure_of(quality)
    table: list[tuple[str, ...]] = [
        (
            variant,
            f"{quality[variant][measure.name]:.2f}" if measure is TEXTS else f"{quality[variant]['exact_match']:.1%}",
            _gain(quality[variant], measure, points=True),
            size(fast["weights_bytes"]),
            f"{fast['latency_ms_p50']:.1f} ms",
        )
        for variant, fast in performance.items()
    ]
    guesses = [name for name in BASELINES if name in quality]
    return table + [(_words(name), f"{quality[name]['exact_match']:.1%}", "", "", "") for name in guesses]


def _gain(row: dict, measure: Measure, *, points: bool = False) -> str:
    """Return the gain of a row, of exact match in points if asked for; nothing where it has none."""
    if measure.gain not in row:
        return ""
    if measure is TEXTS:
        return f"{row[measure.gain]:+.2f}"
    return f"{100 * row['gain']:+.1f}" if points else f"{row['gain']:+.3f}"


def rows(quality: dict, performance: dict) -> list[tuple[str, ...]]:
    """Return the table's cells in the order of `header`: one row per variant, then one per baseline.

    Where answers are classes, F1 is macro-F1.
    """
    table: list[tuple[str, ...]] = []
    measure = measure_of(quality)
    for variant, fast in performance.items():
        good = quality[variant]
        last = (f"{good['retention']:.1%}" if "retention" in good else "-",)
        if measure is TEXTS:
            last = (f"{good['rouge_l']:.3f}",) if _are_continued(quality) else ()
        together = [batch["answers_per_second"] for batch in fast["throughput"].values()]
        table.append(
            (
                variant,
                measure.said(good),
                _gain(good, measure) or "-",
                f"{good.get('macro_f1', good[measure.beside]):.3f}",
                *last,
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
            table.append(cells + ("",) * (len(header(quality)) - len(cells)))
    return table


def _meaning(quality: dict) -> str:
    """Return what the columns of quality mean, in two lines."""
    reference, _ = before_and_after(quality)
    if measure_of(quality) is TEXTS:
        return (
            f"perplexity of a token with its 95% interval, lower is better; saved: by how much it is below that of\n"
            f"{reference}; bits/byte is comparable across tokenizers"
        )
    if any("macro_f1" in row for row in quality.values()):
        return (
            f"exact match, here accuracy, with its 95% interval, gain over that of {reference}; F1 is macro-F1;\n"
            "majority answer is the commonest class, question only that of records of the same question type"
        )
    return (
        f"exact match with its 95% interval, gain over that of {reference}; without looking at\n"
        "the image, question only is the best guess, majority answer the commonest answer to whatever is asked"
    )


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
    names_of_columns = header(found["quality"])
    cells = [names_of_columns, *rows(found["quality"], found["performance"])]
    shown = [dict(zip(names_of_columns, row, strict=True)) for row in cells]
    kept = [name for name in names_of_columns if name not in ("retention", measure_of(found["quality"]).gain_label)]
    kept.insert(kept.index("parameters"), "weights")
    print(render([[(row | {"weights": own})[name] for name in kept] for row, own in zip(shown, weights, strict=True)]))


def show() -> None:
    """Print the table of all variants in metrics/, and where to find more.

    Raises:
        UserError: figures are missing, or of another version.
    """
    quality, performance = (read_json(METRICS / f"{table}.json", "report") for table in ("quality", "performance"))
    try:
        print(render([header(quality), *rows(quality, performance)]))
    except (KeyError, TypeError) as error:
        raise UserError(f"{METRICS}: expected figures of this version, found no {error}; run dvc repro") from None
    try:
        summary = (METRICS / "summary.txt").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{METRICS}/summary.txt: expected a summary, found {error}; run dvc repro report") from None
    opening, *_ = summary.split("\n\n")
    print(f"\n{opening}\n\n{_meaning(quality)}\n")
    print(
        "report   metrics/report.html\nsummary  metrics/summary.txt\nplots    metrics/plots/*.png, or: dvc plots show\n"
        "models   " + ", ".join(str(VARIANTS[name].model) for name in performance if name.startswith("student-"))
    )

"""Write the results as plain text, metrics/summary.txt."""

from firstsight.core.variants import STUDENTS, TEACHER
from firstsight.reporting.criteria import Verdict, conclusions, meanings
from firstsight.reporting.headline import in_points
from firstsight.reporting.measure import TEXTS, measure_of
from firstsight.reporting.summary import BASELINES, before_and_after
from firstsight.reporting.text_table import render, size

PREDICTIONS = ("perplexity", "bits_per_byte", "rouge_1", "rouge_2", "rouge_l")
ACCURACIES = ("exact_match", "f1", "rouge_l", "bleu", "option_accuracy")


def summary(
    opening: list[str],
    quality: dict,
    performance: dict,
    verdicts: list[Verdict],
    unjudged: list[str],
    environments: dict[str, dict[str, str]],
) -> str:
    """Return the lines of `opening` as the first paragraph, which `firstsight table` prints, and all tables as text."""
    places = sorted({f"{where['device']}, {where['engine']}" for where in environments.values()})
    sections = {
        "Size and compression": [
            ("", "parameters", "on disk", "compression"),
            *(
                (name, size(row["parameters"], ""), size(row["disk_bytes"]), _times(row.get("compression")))
                for name, row in performance.items()
            ),
        ],
        "Memory": [
            ("", "weights", "of them saved", "peak, batch 1"),
            *(
                (name, size(row["weights_bytes"]), _percent(row.get("weights_saved")), size(row["peak_bytes"]))
                for name, row in performance.items()
            ),
        ],
        "Speed, batch 1": [
            ("", "latency p50", "p90", "repeats within", "first token", "a token", "by bandwidth", "speed-up"),
            *(
                (
                    name,
                    f"{row['latency_ms_p50']:.1f} ms",
                    f"{row['latency_ms_p90']:.1f} ms",
                    f"{row['latency_spread']:.1%}",
                    f"{row['prefill_ms_p50']:.1f} ms",
                    f"{row['token_ms']:.2f} ms",
                    f"{row['token_limit_ms']:.2f} ms",
                    _times(row.get("speed_up")),
                )
                for name, row in performance.items()
            ),
        ],
        "What computed": [
            ("", "precision", "engine", "device"),
            *((name, where["precision"], where["engine"], where["device"]) for name, where in environments.items()),
        ],
        **_quality(quality, list(performance)),
        **_classes(quality, list(performance)),
        **_against_the_teacher(quality, list(performance)),
        **_gains(quality),
        **_criteria(verdicts),
    }
    explained = "\n".join(f"{name.replace('_', ' ')}: {meaning}" for name, meaning in meanings(quality).items())
    judged = "\n".join([*conclusions(verdicts), *unjudged])
    head = "\n\n".join(["\n".join(opening), judged, "Measured on " + "; and on ".join(places)])
    parts = [f"{title}\n\n{render(cells)}" for title, cells in sections.items()]
    return "\n\n\n".join([head, *parts]) + (f"\n\n{explained}\n" if verdicts else "\n")


def _quality(quality: dict, variants: list[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the table of the figures of quality, by its title."""
    student = quality["student"]
    if measure_of(quality) is TEXTS:
        cut = f", {student['texts_cut']} of them cut by data.max_tokens" if student["texts_cut"] else ""
        return {
            f"Perplexity of {student['tokens']:,} tokens of {student['texts']} test texts{cut}, with 95% intervals": [
                ("", "perplexity", "bits per byte", "ROUGE-1", "ROUGE-2", "ROUGE-L"),
                *((name, *(_interval(quality[name], key) for key in PREDICTIONS)) for name in variants),
            ]
        }
    return {
        f"Accuracy, {student['questions']} test questions, with 95% intervals": [
            ("", "exact match", "F1", "ROUGE-L", "BLEU", "options"),
            *((name, *(_interval(quality[name], key) for key in ACCURACIES)) for name in variants),
            *((name, f"{quality[name]['exact_match']:.3f}", *[""] * 4) for name in BASELINES),
        ]
    }


def _classes(quality: dict, variants: list[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the tables of classes, by their titles, where answers are classes."""
    if "by_class" not in quality[variants[0]]:
        return {}
    _, trained = before_and_after(quality)
    return {
        "Classes": [
            ("", "accuracy", "macro-F1", "calibration error"),
            *(
                (
                    name,
                    _interval(quality[name], "exact_match"),
                    _interval(quality[name], "macro_f1"),
                    f"{quality[name]['calibration_error']:.3f}",
                )
                for name in variants
            ),
        ],
        f"Classes, {trained}": [
            ("", "questions", "precision", "recall", "F1"),
            *(
                (name, str(row["questions"]), *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")))
                for name, row in quality[trained]["by_class"].items()
            ),
        ],
    }


def _against_the_teacher(quality: dict, variants: list[str]) -> dict[str, list[tuple[str, ...]]]:
    """Return the table of what agrees with the teacher, by its title, where there is one."""
    if TEACHER not in quality or measure_of(quality) is TEXTS:
        return {}
    return {
        "Against the teacher": [
            ("", "as the teacher", "retention"),
            *(
                (name, _interval(quality[name], "teacher_agreement"), _percent(quality[name].get("retention")))
                for name in variants
            ),
        ]
    }


def _criteria(verdicts: list[Verdict]) -> dict[str, list[tuple[str, ...]]]:
    """Return the table of verdicts, by its title, if there are any."""
    if not verdicts:
        return {}
    return {
        "Success criteria": [
            ("", "of", "figure", "minimum", "target", "stretch", "reached"),
            *(
                (
                    one.criterion.replace("_", " "),
                    one.variant,
                    one.said(),
                    *(f"{level:g}" for level in (one.levels.minimum, one.levels.target, one.levels.stretch)),
                    one.judged(),
                )
                for one in verdicts
            ),
        ]
    }


def _gains(quality: dict) -> dict[str, list[tuple[str, ...]]]:
    """Return the table of gains, by its title, where they were measured."""
    before, after = before_and_after(quality)
    if before not in quality:
        return {}
    found = {student: quality[student] for student in dict.fromkeys((after, *STUDENTS)) if student in quality}
    if measure_of(quality) is TEXTS:
        return {
            f"Perplexity saved over {before}": [
                ("", "texts", "saved"),
                *((name, str(row["texts"]), _saved(row)) for name, row in found.items()),
            ]
        }
    found |= {f"{after}, {kind}": row for kind, row in quality[after]["gain_by_type"].items()}
    return {
        f"Gain over {before}, in points of exact match": [
            ("", "questions", "gain"),
            *((name, str(row["questions"]), _points(row)) for name, row in found.items()),
        ]
    }


def _saved(row: dict) -> str:
    saved, low, high = (f"{row[TEXTS.gain + end]:+.2f}" for end in ("", "_low", "_high"))
    return f"{saved} ({low} to {high})"


def _points(row: dict) -> str:
    gain, low, high = in_points(row)
    return f"{gain} ({low} to {high})"


def _interval(row: dict, key: str) -> str:
    return f"{row[key]:.3f} ({row[key + '_low']:.2f}-{row[key + '_high']:.2f})" if key in row else "-"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"

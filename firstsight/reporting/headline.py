"""Say what was compared, and what distilling added to fine-tuning the same student without a teacher."""

from pathlib import Path
from typing import Any

from firstsight.core.params import Control
from firstsight.core.variants import CONTROL, DISTILLED, TEACHER
from firstsight.reporting.measure import TEXTS, measure_of
from firstsight.reporting.text_table import size


def subject(models: dict[str, dict[str, Any]], quality: dict, performance: dict) -> str:
    """Return a line that says which teacher, which student and how many test questions; tables as in metrics/."""
    named = [
        f"{role.capitalize()}: {size(performance[role]['parameters'], '')} parameters ({origin(models[role])})."
        for role in ("teacher", "student")
        if role in models
    ]
    what = measure_of(quality).what
    return f"{' '.join(named)} {quality['student'][what]} test {what}."


def origin(model: dict[str, Any]) -> str:
    """Return the source of a row of metrics/models.json: a hub repository or a folder, without the path to it."""
    if model["source"] == "init":
        return "fresh weights"
    folder = Path(model["source"])
    return folder.name if folder.is_absolute() else model["source"]


def headline(quality: dict, control: Control, left_out: str | None) -> str:
    """Return one sentence: what distilling added to exact match, with its 95% interval, or why that is not known.

    Without a teacher, it says what fine-tuning added to the student.
    `left_out` is the reason why the control is not among the rows of `quality`, which are as in metrics/.
    """
    texts = measure_of(quality) is TEXTS
    if TEACHER not in quality and texts:
        own, other = quality[CONTROL], quality["student"]
        return (
            f"Fine-tuned, the student has a perplexity of {own['perplexity']:.2f} on {own['texts']} test texts, before "
            f"{other['perplexity']:.2f}: {_saved(own)}."
        )
    if TEACHER not in quality:
        own, other = quality[CONTROL], quality["student"]
        return (
            f"Fine-tuned, the student answers {own['exact_match']:.1%} of {own['questions']} test questions exactly, "
            f"before {other['exact_match']:.1%}: {_gained(own)}."
        )
    alone = "the labels alone" if control.answers == "labels" else "the labels and the teacher's answers"
    if CONTROL not in quality:
        remedy = "" if control.enabled else "; control.enabled: true in params.yaml measures it"
        return f"What distilling adds to fine-tuning on {alone} is not known, because {left_out}{remedy}."
    own, other = quality[DISTILLED], quality[CONTROL]
    if texts:
        return (
            f"Distilling gives a perplexity of {own['perplexity']:.2f} on {own['texts']} test texts, fine-tuning on "
            f"the texts alone {other['perplexity']:.2f}: {_saved(own)}."
        )
    return (
        f"Distilling answers {own['exact_match']:.1%} of {own['questions']} test questions exactly, fine-tuning on "
        f"{alone} {other['exact_match']:.1%}: {_gained(own)}."
    )


def _gained(row: dict[str, float]) -> str:
    gain, low, high = in_points(row)
    chance = ", which cannot be told from chance" if row["gain_low"] <= 0 <= row["gain_high"] else ""
    return f"{gain} points (95% interval {low} to {high}){chance}"


def _saved(row: dict[str, float]) -> str:
    saved, low, high = (row[f"{TEXTS.gain}{end}"] for end in ("", "_low", "_high"))
    chance = ", which cannot be told from chance" if low <= 0 <= high else ""
    return f"{saved:+.2f} saved (95% interval {low:+.2f} to {high:+.2f}){chance}"


def in_points(row: dict[str, float]) -> tuple[str, str, str]:
    """Return a row's gain and the ends of its interval in percentage points, as text with signs."""
    gain, low, high = (f"{100 * row[key]:+.1f}" for key in ("gain", "gain_low", "gain_high"))
    return gain, low, high

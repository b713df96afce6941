"""The figures of all variants side by side: what metrics/ holds and the comparison table shows."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from firstsight.data.records import Record, Sample
from firstsight.evaluation.metrics import exact_match

TEACHER = "teacher"
VARIANTS = (TEACHER, "student", "student-distilled", "student-quantized")
_STABLE = (
    "questions",
    "exact_match",
    "exact_match_low",
    "exact_match_high",
    "f1",
    "rouge_l",
    "bleu",
    "option_accuracy",
    "options_unparsed",
)
_NOISY = (
    "parameters",
    "disk_bytes",
    "weights_bytes",
    "peak_bytes",
    "load_seconds",
    "prefill_ms_p50",
    "latency_ms_p50",
    "latency_ms_p90",
    "decode_tokens_per_second",
)
_SOURCE = ("source", "commit", "licence", "architecture", "parameters", "dtype", "bytes")


def models_table(sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of teacher and student as downloaded: where from, under which licence, and what; the commonest dtype first."""
    return {
        role: {name: (source | {"dtype": ", ".join(source["dtypes"])})[name] for name in _SOURCE}
        for role, source in sources.items()
    }


def baselines(train: Iterable[Sample], test: Iterable[Record]) -> dict[str, float]:
    """Exact match of two guesses that look at nothing but training answers.

    `majority-answer` is the commonest of them all. `question-only` is the commonest to that very question; where it
    never occurs in training, the commonest to its type, else of all.
    """
    by_question, by_type, overall = defaultdict(Counter), defaultdict(Counter), Counter()
    for sample in train:
        for record in sample.records:
            if record.answer:
                by_question[record.prompt()][record.answer] += 1
                by_type[record.question_type][record.answer] += 1
                overall[record.answer] += 1
    majority, question_only = [], []
    for record in test:
        counts = by_question.get(record.prompt()) or by_type.get(record.question_type) or overall
        for right, guesses in ((majority, overall), (question_only, counts)):
            right.append(exact_match(guesses.most_common(1)[0][0] if guesses else "", record.answers))
    return {"majority-answer": float(np.mean(majority)), "question-only": float(np.mean(question_only))}


def quality_table(
    quality: dict[str, dict[str, Any]], predictions: dict[str, list[str]], guesses: dict[str, float]
) -> dict[str, dict[str, float]]:
    """By variant: the quality figures, `retention` (exact match against the teacher's) and `teacher_agreement`.

    By baseline, as `guesses` has them: exact match alone.
    """
    reference = quality[TEACHER]["exact_match"]
    table: dict[str, dict[str, float]] = {name: {"exact_match": right} for name, right in guesses.items()}
    for variant in VARIANTS:
        row = {name: quality[variant][name] for name in _STABLE if name in quality[variant]}
        row["teacher_agreement"] = float(
            np.mean(
                [
                    exact_match(own, [teacher])
                    for own, teacher in zip(predictions[variant], predictions[TEACHER], strict=True)
                ]
            )
        )
        # A teacher that answers nothing right leaves nothing to retain.
        if reference > 0:
            row["retention"] = row["exact_match"] / reference
        table[variant] = row
    return table


def performance_table(performance: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By variant: sizes and speeds, and `compression` and `speed_up` against the teacher."""
    table = {}
    for variant in VARIANTS:
        row = {name: performance[variant][name] for name in _NOISY if name in performance[variant]}
        row["compression"] = performance[TEACHER]["disk_bytes"] / row["disk_bytes"]
        row["speed_up"] = performance[TEACHER]["latency_ms_p50"] / row["latency_ms_p50"]
        table[variant] = row
    return table


def points(quality: dict, performance: dict) -> list[tuple[str, float, float, float]]:
    """By variant: exact match, milliseconds an answer, megabytes on disk."""
    return [
        (
            variant,
            quality[variant]["exact_match"],
            performance[variant]["latency_ms_p50"],
            performance[variant]["disk_bytes"] / 1e6,
        )
        for variant in VARIANTS
    ]


def training_curve(history: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """By split, the steps at which its loss a token was logged, and that loss."""
    names = {"train": "loss", "validation": "eval_objective"}
    return {split: [(row["step"], row[name]) for row in history if name in row] for split, name in names.items()}


def training_summary(history: list[dict[str, float]]) -> dict[str, float]:
    """Of the epoch whose weights were kept (the least validation loss): the loss and its parts, and the step."""
    epochs = [entry for entry in history if "eval_objective" in entry]
    if not epochs:
        return {}
    best = min(epochs, key=lambda entry: entry["eval_objective"])
    return {"step": best["step"], "steps": history[-1]["step"]} | {
        f"validation_{name}": best[f"eval_{name}"]
        for name in ("objective", "divergence", "ce", "agreement")
        if f"eval_{name}" in best
    }

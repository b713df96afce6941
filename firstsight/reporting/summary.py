"""Put the figures of all measured variants side by side, as metrics/*.json and the comparison table hold them."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from firstsight.core.params import Train
from firstsight.core.variants import CONTROL, DISTILLED, EXPORTED, EXPORTED_TEACHER, STUDENTS, TEACHER
from firstsight.evaluation.metrics import agreement, bootstrap_interval, exact_match, is_right, proportion_interval
from firstsight.evaluation.perplexity import loss_table, perplexity
from firstsight.records.sample import Record, Sample
from firstsight.records.text_loss import TextLoss
from firstsight.reporting.measure import TEXTS, measure_of

BASELINES = QUESTION_ONLY, MAJORITY = "question-only", "majority-answer"
# The figures of evaluations/*/performance.json that the report takes over.
COSTS = (
    "parameters",
    "disk_bytes",
    "weights_bytes",
    "peak_bytes",
    "load_seconds",
    "prefill_ms_p50",
    "latency_ms_p50",
    "latency_ms_p90",
    "latency_spread",
    "token_ms",
    "token_limit_ms",
    "decode_tokens_per_second",
    "throughput",
)
_SOURCE = ("source", "commit", "licence", "architecture", "parameters", "dtype", "bytes")


@dataclass(frozen=True)
class Measured:
    """Hold the output of `evaluate` for a variant; `predictions` are in the order of the test questions.

    Of texts, there are `losses` too, and the predictions are the perplexity of each as words, with its continuation.
    """

    quality: dict[str, Any]
    performance: dict[str, Any]
    predictions: list[str]
    losses: list[TextLoss] = field(default_factory=list)


def before_and_after(quality: dict) -> tuple[str, str]:
    """Return the two variants whose difference is the gain.

    They are the control and the distilled student; without a teacher, the student before and after fine-tuning.
    """
    return (CONTROL, DISTILLED) if TEACHER in quality else ("student", CONTROL)


def unusable(quality: Any, performance: Any) -> str | None:
    """Describe the first figure that the report needs and that is missing or not a number; None if all are usable."""
    if not (isinstance(quality, dict) and isinstance(performance, dict)):
        return "no figures"
    texts = TEXTS.name in quality
    ranges = ("perplexity", "bits_per_byte") if texts else ("exact_match", "f1", "rouge_l")
    wanted = [(quality, name + end) for name in ranges for end in ("", "_low", "_high")]
    wanted += [(performance, name) for name in COSTS if name != "throughput"]
    for table, name in wanted:
        value = table.get(name)
        if not isinstance(value, int | float) or not math.isfinite(value) or (table is performance and value < 0):
            return f"{value!r} for {name}"
    if missing := [name for name in ("device", "engine", "precision", "throughput") if name not in performance]:
        return f"none for {missing[0]}"
    if not texts and not isinstance(quality.get("by_type"), dict):
        return "none by question type"
    nothing = [name for name in ("disk_bytes", "weights_bytes", "latency_ms_p50") if performance[name] == 0]
    return f"0 for {nothing[0]}" if nothing else None


def models_table(sources: Mapping[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Return source, licence, architecture and size of teacher and student as downloaded; the commonest dtype first.

    A source is None where there is no teacher.
    """
    return {
        role: {name: (source | {"dtype": ", ".join(source["dtypes"])})[name] for name in _SOURCE}
        for role, source in sources.items()
        if source is not None
    }


def baselines(train: Iterable[Sample], test: Iterable[Record]) -> dict[str, float]:
    """Return the exact match of two baselines that use the training answers only.

    `majority-answer` always guesses the commonest training answer. `question-only` guesses the commonest answer to the
    same question; to a question that is not in the train split, the commonest for its type, else of all.
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
    return {MAJORITY: float(np.mean(majority)), QUESTION_ONLY: float(np.mean(question_only))}


def quality_table(
    measured: dict[str, Measured],
    records: Sequence[Record],
    groups: Sequence[str],
    guesses: dict[str, float],
    bootstrap_samples: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return the rows of metrics/quality.json.

    A variant's row has its figures, `teacher_agreement` (share of answers equal to the teacher's, right or wrong) and
    `retention` (exact match over the teacher's), with 95% intervals. Where the control was measured, the row of a
    student made by distilling also has `gain`, its exact match minus the control's on the same questions, overall and
    `gain_by_type`; without a teacher, that of a trained student has its gain over the student before. A row of the
    baselines in `guesses` has exact match only.
    """

    right = {
        name: np.array([is_right(*asked) for asked in zip(records, variant.predictions, strict=True)])
        for name, variant in measured.items()
    }
    table: dict[str, dict[str, Any]] = {name: {"exact_match": share} for name, share in guesses.items()}
    for name, variant in measured.items():
        row = {key: value for key, value in variant.quality.items() if key != "by_type"}
        if TEACHER in measured:
            answered = zip(records, variant.predictions, measured[TEACHER].predictions, strict=True)
            same = np.array([agreement(record, own, other) for record, own, other in answered])
            low, high = proportion_interval(same, groups)
            row |= {"teacher_agreement": float(same.mean())}
            row |= {"teacher_agreement_low": low, "teacher_agreement_high": high}
            # Retention is undefined if the teacher has no right answer.
            if right[TEACHER].any():
                both = np.stack([right[name], right[TEACHER]], axis=1)
                low, high = bootstrap_interval(both, groups, bootstrap_samples, seed, _ratio)
                row |= {"retention": _ratio(both), "retention_low": low, "retention_high": high}
        before, after = before_and_after(measured)
        if name in (after, *STUDENTS) and before in measured:
            row |= _gains(right[name] - right[before], records, groups, bootstrap_samples, seed)
        table[name] = row
    return table


def texts_table(
    measured: dict[str, Measured], groups: Sequence[str], bootstrap_samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return the rows of metrics/quality.json for texts.

    A variant's row has its figures. Those of students that have a gain in `quality_table` have `perplexity_saved` here:
    the perplexity of the control, or of the student before, minus their own, with its 95% interval, for which both
    losses of a text are resampled together.
    """
    before, after = before_and_after(measured)
    rows = {}
    for name, variant in measured.items():
        row = dict(variant.quality)
        if name in (after, *STUDENTS) and before in measured:
            both = np.stack([loss_table(measured[before].losses), loss_table(variant.losses)], axis=1)
            low, high = bootstrap_interval(both, groups, bootstrap_samples, seed, _saved)
            row |= {TEXTS.gain: _saved(both), f"{TEXTS.gain}_low": low, f"{TEXTS.gain}_high": high}
        rows[name] = row
    return rows


def _saved(both: np.ndarray) -> float:
    """Return the perplexity over the first of two losses of each text [n, 2, 3], minus that over the second."""
    return perplexity(both[:, 0]) - perplexity(both[:, 1])


def _gains(
    differences: np.ndarray, records: Sequence[Record], groups: Sequence[str], bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """Return the mean of the questions' differences [n] and of those of each question type, with intervals.

    A resampling takes a question's two answers together, so that the interval is that of a paired comparison.
    """
    rows = pd.DataFrame({"gain": differences, "group": groups, "type": [record.question_type for record in records]})

    def gain(some: pd.DataFrame) -> dict[str, float]:
        values = some["gain"].to_numpy()
        low, high = bootstrap_interval(values, some["group"], bootstrap_samples, seed)
        return {"gain": float(values.mean()), "gain_low": low, "gain_high": high}

    by_type = {str(kind): {"questions": len(some)} | gain(some) for kind, some in rows.groupby("type")}
    return gain(rows) | {"gain_by_type": by_type}


def _ratio(both: np.ndarray) -> float:
    """Return the ratio of the two columns' sums, or 1 if the second sum is 0."""
    own, teachers = both.sum(axis=0)
    return float(own / teachers) if teachers else 1.0


def performance_table(measured: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Return the `COSTS` of each variant, with three figures relative to the teacher, if there is one.

    `compression` is the teacher's bytes on disk over the variant's, `weights_saved` the share of the teacher's bytes of
    weights in memory that the variant does not take, and `speed_up` the teacher's median latency over the variant's.
    The latency of an exported student is compared with that of the exported teacher, in the same engine; where that was
    not measured, it has no `speed_up`.
    """
    table = {}
    for name, variant in measured.items():
        row = {key: variant.performance[key] for key in COSTS}
        if TEACHER in measured:
            teacher = measured[TEACHER].performance
            row["compression"] = teacher["disk_bytes"] / row["disk_bytes"]
            row["weights_saved"] = 1 - row["weights_bytes"] / teacher["weights_bytes"]
        alike = EXPORTED_TEACHER if name in (EXPORTED_TEACHER, *EXPORTED) else TEACHER
        if alike in measured:
            row["speed_up"] = measured[alike].performance["latency_ms_p50"] / row["latency_ms_p50"]
        table[name] = row
    return table


def key_figures(quality: dict, performance: dict, training: dict) -> dict[str, dict[str, float]]:
    """Return metrics/metrics.json: of all figures the few that DVC compares, under short names; tables as in metrics/.

    Those of exported students are left to metrics/performance.json and metrics/quality.json.
    `megabytes` are those of the weights in memory, `loss` and `agreement` those of the student's best epoch.
    """
    alone = (TEACHER, CONTROL) if TEACHER in quality else ("student", CONTROL)
    measure = measure_of(quality)
    shown = (measure.name, measure.beside) if measure is TEXTS else (measure.name,)
    table = {_short(name): {key: quality[name][key] for key in shown} for name in alone if name in quality}
    for student in STUDENTS:
        if student in performance and student not in EXPORTED:
            good, fast = quality[student], performance[student]
            row = {name: good[name] for name in (*shown, "macro_f1", measure.gain, "retention") if name in good}
            table[_short(student)] = row | {
                "megabytes": fast["weights_bytes"] / 1e6,
                "latency_ms": fast["latency_ms_p50"],
            }
    names = {"loss": "validation_objective", "agreement": "validation_agreement"}
    trained = training["distill"] or training.get("finetune-student", {})
    return table | {"training": {short: trained[name] for short, name in names.items() if name in trained}}


def _short(student: str) -> str:
    return student.removeprefix("student-")


def sweep_point(train: Train, quality: dict) -> pd.DataFrame:
    """Return one row: T, alpha, exact match of the distilled student with its interval, that of the control or none.

    Without a teacher there is no row, and of texts neither.
    DVC draws the rows of several experiments together.
    """
    columns = ["temperature", "alpha", "exact_match", "low", "high", "control"]
    if DISTILLED not in quality or measure_of(quality) is TEXTS:
        return pd.DataFrame(columns=columns)
    row = {"temperature": train.temperature, "alpha": train.alpha, **_with_ends(quality[DISTILLED], "exact_match")}
    row |= {"control": quality[CONTROL]["exact_match"] if CONTROL in quality else None}
    return pd.DataFrame([row], columns=columns)


def points(quality: dict, performance: dict) -> pd.DataFrame:
    """Return a row per variant: exact match, the ends of its interval, latency in milliseconds, peak and disk in MB.

    Of texts, perplexity takes the place of exact match.
    """
    measure = measure_of(quality)
    rows = [
        {
            "variant": variant,
            **_with_ends(quality[variant], measure.name),
            "latency_ms": row["latency_ms_p50"],
            "memory_mb": row["peak_bytes"] / 1e6,
            "disk_mb": row["disk_bytes"] / 1e6,
        }
        for variant, row in performance.items()
    ]
    return pd.DataFrame(rows)


def by_type(found: dict[str, dict[str, dict[str, float]]]) -> pd.DataFrame:
    """Return a row per question type and variant: exact match, the ends of its interval, the number of questions."""
    rows = [
        {"type": kind, "variant": variant, **_with_ends(row, "exact_match"), "questions": row["questions"]}
        for variant, types in found.items()
        for kind, row in types.items()
    ]
    columns = ["type", "variant", "exact_match", "low", "high", "questions"]
    return pd.DataFrame(rows, columns=columns).sort_values("type", kind="stable")


def _with_ends(row: dict[str, float], name: str) -> dict[str, float]:
    return {name: row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}


def training_curve(history: list[dict[str, float]]) -> dict[str, pd.DataFrame]:
    """Return, by split, the optimizer steps at which the loss per token was logged, and that loss."""
    names = {"train": "loss", "validation": "eval_objective"}
    rows = {split: [(row["step"], row[name]) for row in history if name in row] for split, name in names.items()}
    return {split: pd.DataFrame(points, columns=["step", "loss"]) for split, points in rows.items()}


def training_summary(history: list[dict[str, float]], metric: str = "objective") -> dict[str, float]:
    """Return the step and the validation loss with its parts of the epoch whose weights were kept.

    That is the first with the least objective, or with the highest accuracy, as `metric` says.

    firstsight/loss/distillation_loss.py defines the objective and its parts.
    """
    epochs = [entry for entry in history if "eval_objective" in entry]
    if not epochs:
        return {}
    sign = -1 if metric == "accuracy" else 1
    best = min(epochs, key=lambda entry: sign * entry[f"eval_{metric}"])
    return {"step": best["step"], "steps": history[-1]["step"]} | {
        f"validation_{name}": best[f"eval_{name}"]
        for name in ("objective", "divergence", "ce", "agreement", "accuracy")
        if f"eval_{name}" in best
    }


def quantization_table(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return, by method, the layers quantized and kept, bytes in memory before and after, median and largest error."""
    return {
        method: {key: one[key] for key in ("quantized_layers", "kept_layers", "original_bytes", "bytes")}
        | {"error_median": float(np.median(list(one["errors"].values()))), "error_most": max(one["errors"].values())}
        for method, one in found.items()
    }

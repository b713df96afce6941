"""The quality figures of one variant, overall and by question type."""

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np

from firstsight.data.records import Record
from firstsight.evaluation.metrics import Scores, bleu, bleu_statistics, bootstrap_interval, score


def summarise(records: Sequence[Record], predicted: Sequence[str], bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Means over the records, each in [0, 1], with the ends `_low` and `_high` of 95% intervals; and `by_type`.

    `option_accuracy` is of the questions with options alone, of which `options_unparsed` answers choose none.
    """
    scores = np.array([astuple(score(record, answer)) for record, answer in zip(records, predicted, strict=True)])
    columns = dict(zip([field.name for field in fields(Scores)], scores.T, strict=True))
    with_options = np.array([bool(record.options) for record in records])
    counted = np.array([bleu_statistics(record, answer) for record, answer in zip(records, predicted, strict=True)])

    summary: dict[str, Any] = {"questions": len(records)}
    for name in ("exact_match", "f1", "rouge_l"):
        summary |= _mean(name, columns[name], bootstrap_samples, seed)
    low, high = bootstrap_interval(counted, bootstrap_samples, seed, lambda drawn: bleu(drawn.sum(axis=0)))
    summary |= {"bleu": bleu(counted.sum(axis=0)), "bleu_low": low, "bleu_high": high}
    if with_options.any():
        summary |= _mean("option_accuracy", columns["exact_match"][with_options], bootstrap_samples, seed)
        summary["options_unparsed"] = int(columns["unparsed"].sum())
    types = np.array([record.question_type for record in records])
    summary["by_type"] = {
        str(name): {"questions": int((types == name).sum())}
        | _mean("exact_match", columns["exact_match"][types == name], bootstrap_samples, seed)
        for name in sorted(set(types))
    }
    return summary


def _mean(name: str, values: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, samples, seed)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}

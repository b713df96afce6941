"""The quality figures of one variant, overall and by question type."""

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np

from firstsight.evaluation.metrics import (
    Scores,
    bleu,
    bleu_order,
    bleu_statistics,
    bootstrap_interval,
    proportion_interval,
    score,
)
from firstsight.records.sample import Record


def summarise(
    records: Sequence[Record], groups: Sequence[str], predicted: Sequence[str], bootstrap_samples: int, seed: int
) -> dict[str, Any]:
    """Means over the records, each in [0, 1], with the ends `_low` and `_high` of 95% intervals; and `by_type`.

    `option_accuracy` is of the questions with options alone, of which `options_unparsed` answers choose none; BLEU is
    of the others, with n-grams of at most `bleu_order` words. `groups` are the records', whose media belong together.
    """
    scores = np.array([astuple(score(record, answer)) for record, answer in zip(records, predicted, strict=True)])
    columns = dict(zip([field.name for field in fields(Scores)], scores.T, strict=True))
    with_options = np.array([bool(record.options) for record in records])
    types = np.array([record.question_type for record in records])
    together = np.array(groups)

    summary: dict[str, Any] = {"questions": len(records)} | _share("exact_match", columns["exact_match"], together)
    for name in ("f1", "rouge_l"):
        low, high = bootstrap_interval(columns[name], together, bootstrap_samples, seed)
        summary |= {name: float(columns[name].mean()), f"{name}_low": low, f"{name}_high": high}
    if not with_options.all():
        open_ones = [one for one in zip(records, predicted, strict=True) if not one[0].options]
        order = bleu_order([record for record, _ in open_ones])
        counted = np.array([bleu_statistics(record, answer, order) for record, answer in open_ones])
        low, high = bootstrap_interval(
            counted, together[~with_options], bootstrap_samples, seed, lambda drawn: bleu(drawn.sum(axis=0))
        )
        summary |= {"bleu": bleu(counted.sum(axis=0)), "bleu_low": low, "bleu_high": high, "bleu_order": order}
    if with_options.any():
        summary |= _share("option_accuracy", columns["exact_match"][with_options], together[with_options])
        summary["options_unparsed"] = int(columns["unparsed"].sum())
    summary["by_type"] = {
        str(name): {"questions": int((types == name).sum())}
        | _share("exact_match", columns["exact_match"][types == name], together[types == name])
        for name in sorted(set(types))
    }
    return summary


def _share(name: str, right: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    low, high = proportion_interval(right, groups)
    return {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}

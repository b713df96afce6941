"""Compute the quality figures of one variant, overall and by question type.

To add a metric, define a per-answer one in metrics.py and list its name next to `f1` and `rouge_l` below; compute a
corpus-level one as `bleu` is, from statistics per answer. Every figure returned here reaches metrics/quality.json and
the report's list of all figures; firstsight/reporting/summary_text.py and comparison.py choose those of the tables.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from firstsight.evaluation.metrics import (
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
    """Return means over the records, each in [0, 1], the ends `_low` and `_high` of their 95% intervals, and `by_type`.

    `option_accuracy` is over the questions with options only, and `options_unparsed` counts the answers that choose no
    option; BLEU is over the other questions, with n-grams of up to `bleu_order` words. Records of the same group in
    `groups` are resampled together.
    """
    scores = pd.DataFrame([score(record, answer) for record, answer in zip(records, predicted, strict=True)]).assign(
        option_accuracy=lambda rows: rows["exact_match"],
        group=groups,
        type=[record.question_type for record in records],
        closed=[bool(one.options) for one in records],
    )
    summary: dict[str, Any] = {"questions": len(records)}
    summary |= _share("exact_match", scores) | _share("squad_exact_match", scores)
    for name in ("f1", "rouge_l", "squad_f1"):
        values = scores[name].to_numpy()
        low, high = bootstrap_interval(values, scores["group"], bootstrap_samples, seed)
        summary |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    if not scores["closed"].all():
        open_ones = [one for one in zip(records, predicted, strict=True) if not one[0].options]
        order = bleu_order([record for record, _ in open_ones])
        counted = np.array([bleu_statistics(record, answer, order) for record, answer in open_ones])
        open_groups = scores["group"][~scores["closed"]]
        low, high = bootstrap_interval(
            counted, open_groups, bootstrap_samples, seed, lambda drawn: bleu(drawn.sum(axis=0))
        )
        summary |= {"bleu": bleu(counted.sum(axis=0)), "bleu_low": low, "bleu_high": high, "bleu_order": order}
    if scores["closed"].any():
        summary |= _share("option_accuracy", scores[scores["closed"]])
        summary["options_unparsed"] = int(scores["unparsed"].sum())
    summary["by_type"] = {
        name: {"questions": len(rows)} | _share("exact_match", rows) for name, rows in scores.groupby("type")
    }
    return summary


def _share(name: str, scores: pd.DataFrame) -> dict[str, float]:
    """Return the mean of the zeros and ones in the column `name`, with the ends of its interval."""
    right = scores[name].to_numpy()
    low, high = proportion_interval(right, scores["group"])
    return {name: float(right.mean()), f"{name}_low": low, f"{name}_high": high}

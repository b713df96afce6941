"""Compute the figures of a classification: macro-F1, precision, recall and F1 of each class, calibration error.

Accuracy is the exact match of `firstsight.evaluation.quality`: an answer is the name of a class, and no two names read
the same.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from firstsight.evaluation.metrics import bootstrap_interval

# Bins of equal width in which confidence is compared with accuracy, as Guo et al. do.
_BINS = 15


def confusion(classes: Sequence[str], truth: Sequence[str], predicted: Sequence[str]) -> np.ndarray:
    """Count the records of each class, by the class that was predicted: int64 [C, C], a row for each true class."""
    numbers = {name: number for number, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, ([numbers[name] for name in truth], [numbers[name] for name in predicted]), 1)
    return counts


def precision_recall_f1(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 of each class, [C, 3], of a confusion matrix; 0 where one is undefined."""
    right, predicted, true = np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)
    shares = [(right, predicted), (right, true), (2 * right, predicted + true)]
    return np.stack([above / np.maximum(below, 1) for above, below in shares], axis=1)


def macro_f1(counts: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur in a confusion matrix, in the truth or among the predictions."""
    occurs = counts.sum(axis=0) + counts.sum(axis=1) > 0
    return float(precision_recall_f1(counts)[occurs, 2].mean())


def calibration_error(right: np.ndarray, confidence: np.ndarray) -> float:
    """Return the expected calibration error, in [0, 1] (Guo et al., 2017, arXiv:1706.04599).

    It is the mean over the records of the difference between accuracy and mean confidence in 15 bins of confidence.

    Args:
        right: [n], 1 for a right prediction, else 0.
        confidence: [n], the probability that the model gives its prediction.
    """
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))


def summarise_classes(
    classes: Sequence[str],
    truth: Sequence[str],
    predicted: Sequence[str],
    confidence: Sequence[float],
    groups: Sequence[str],
    bootstrap_samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return `macro_f1` with the ends of its 95% interval, `calibration_error`, and `by_class`.

    `by_class` has the number of `questions` of each class, and its precision, recall and F1. Records of the same group
    in `groups` are resampled together.
    """
    counts = confusion(classes, truth, predicted)
    numbers = {name: number for number, name in enumerate(classes)}
    pairs = np.array([[numbers[name] for name in pair] for pair in zip(truth, predicted, strict=True)])

    def resampled(some: np.ndarray) -> float:
        drawn = np.zeros_like(counts)
        np.add.at(drawn, (some[:, 0], some[:, 1]), 1)
        return macro_f1(drawn)

    low, high = bootstrap_interval(pairs, groups, bootstrap_samples, seed, resampled)
    right = (pairs[:, 0] == pairs[:, 1]).astype(float)
    return {
        "macro_f1": macro_f1(counts),
        "macro_f1_low": low,
        "macro_f1_high": high,
        "calibration_error": calibration_error(right, np.array(confidence)),
        "by_class": {
            name: {"questions": int(questions)} | dict(zip(("precision", "recall", "f1"), map(float, row), strict=True))
            for name, questions, row in zip(classes, counts.sum(axis=1), precision_recall_f1(counts), strict=True)
        },
    }

"""Summarise how well a language model predicts texts: perplexity, bits per byte, ROUGE of continuations.

Perplexity is exp of the mean -log p of a token. It depends on the tokenizer, which decides what a token is. Bits per
byte is the sum of -log2 p over the bytes of the texts in UTF-8, whatever the tokens: it is comparable across
tokenizers, where none of the texts is cut.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from firstsight.evaluation.metrics import bootstrap_interval, rouge
from firstsight.records.sample import Record
from firstsight.records.text_loss import TextLoss

# Columns of `loss_table`.
NATS, TOKENS, BYTES = range(3)


def summarise_texts(
    losses: Sequence[TextLoss],
    groups: Sequence[str],
    continued: Sequence[tuple[str, Record, str]],
    bootstrap_samples: int,
    seed: int,
) -> dict[str, Any]:
    """Return the figures over the texts, each with the ends `_low` and `_high` of its 95% interval, and the counts.

    Args:
        groups: of each text; those of the same group are resampled together.
        continued: group, text with its beginning as the question, and the model's continuation. ROUGE-1, 2 and L, in
            [0, 1], compare it with the rest of the text.
    """
    values = loss_table(losses)
    summary: dict[str, Any] = {
        "texts": len(losses),
        "texts_cut": sum(one.cut for one in losses),
        "tokens": int(values[:, TOKENS].sum()),
        "bytes": int(values[:, BYTES].sum()),
    }
    for name, figure in (("perplexity", perplexity), ("bits_per_byte", bits_per_byte)):
        low, high = bootstrap_interval(values, groups, bootstrap_samples, seed, figure)
        summary |= {name: figure(values), f"{name}_low": low, f"{name}_high": high}
    if continued:
        scores = np.array([rouge(given, record.answer) for _, record, given in continued])
        summary["continuations"] = len(continued)
        for name, column in zip(("rouge_1", "rouge_2", "rouge_l"), scores.T, strict=True):
            low, high = bootstrap_interval(column, [group for group, _, _ in continued], bootstrap_samples, seed)
            summary |= {name: float(column.mean()), f"{name}_low": low, f"{name}_high": high}
    return summary


def loss_table(losses: Sequence[TextLoss]) -> np.ndarray:
    """Return nats, tokens and bytes of each text, float64 [n, 3]."""
    return np.array([(one.nats, one.tokens, one.bytes) for one in losses], np.float64)


def perplexity(rows: np.ndarray) -> float:
    """Return the perplexity of a token over rows of `loss_table`."""
    return float(np.exp(rows[:, NATS].sum() / rows[:, TOKENS].sum()))


def bits_per_byte(rows: np.ndarray) -> float:
    """Return the bits of a byte over rows of `loss_table`."""
    return float(rows[:, NATS].sum() / math.log(2) / rows[:, BYTES].sum())

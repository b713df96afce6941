"""Multiply hidden states and gradients by output heads, without a full copy of a 16-bit head in float32."""

import torch
from torch import Tensor
from torch.nn.functional import linear

# Answer tokens whose logits are in memory at once, per model: 156 MB in float32 at a vocabulary of 152,000. Fewer would
# read the head and its gradient from memory more often; more would save little time.
CHUNK = 256
# Rows of a 16-bit head converted at once.
HEAD_ROWS = 16_384


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Return hidden [n, H] times head [V, H] transposed, in the dtype of `hidden`; a narrower head is cast in parts."""
    if head.dtype == hidden.dtype:
        return linear(hidden, head)
    product = hidden.new_empty(len(hidden), len(head))
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        torch.mm(hidden, head[rows].to(hidden.dtype).T, out=product[:, rows])
    return product


def times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """Return gradient [n, V] times head [V, H], in the dtype of `gradient`; a narrower head is cast in parts."""
    if head.dtype == gradient.dtype:
        return gradient @ head
    product = gradient.new_zeros(len(gradient), head.shape[1])
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        product.addmm_(gradient[:, rows], head[rows].to(gradient.dtype))
    return product

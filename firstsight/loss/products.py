"""Products of hidden states and output heads, in the sizes that memory allows."""

import torch
from torch import Tensor
from torch.nn.functional import linear

# Rows of logits alive at once, of each model: at a vocabulary of 152,000 they take 156 MB in float32. Fewer would
# stream the head and its gradient through memory more often, more would buy little.
CHUNK = 256
# Rows of a 16-bit head converted at once.
HEAD_ROWS = 16_384


def logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, H] times head [V, H] transposed, in the precision of `hidden`; no whole copy of a narrower head."""
    if head.dtype == hidden.dtype:
        return linear(hidden, head)
    product = hidden.new_empty(len(hidden), len(head))
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        torch.mm(hidden, head[rows].to(hidden.dtype).T, out=product[:, rows])
    return product


def times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """gradient [n, V] times head [V, H], in the precision of `gradient`; no whole copy of a narrower head."""
    if head.dtype == gradient.dtype:
        return gradient @ head
    product = gradient.new_zeros(len(gradient), head.shape[1])
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        product.addmm_(gradient[:, rows], head[rows].to(gradient.dtype))
    return product

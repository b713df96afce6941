"""Multiply hidden states and gradients by output heads, without a full copy of a 16-bit head in float32.

On CUDA, operands that have the same 16-bit type are multiplied on the tensor cores: products of two 16-bit numbers are
exact in float32, sums are in float32, and so is the result. Other operands, and all on the CPU, are multiplied in
float32 (or float64), which the tensor cores take in TF32 inside of `tf32`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

# Answer tokens whose logits are in memory at once, per model: 156 MB in float32 at a vocabulary of 152,000 on the CPU,
# 389 MB on CUDA. Fewer would read the heads and their gradient from memory more often, which a GPU's cache does not
# hold: of 8,192 tokens, 640 at a time read and write the student's head gradient (933 MB) 13 times. More would save
# less and less time.
CHUNK = {"cpu": 256, "cuda": 640}
# Rows of a 16-bit head converted at once.
HEAD_ROWS = 16_384
# Logits of a GPU's matrix products come in tiles of as many columns. Rows of logits that begin in the middle of one, as
# those of 151,657 columns do, have no fast product.
TILE = 128


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within this context, if `allowed`, round the operands of float32 products on CUDA to TF32's 10 bits.

    Not for the whole process: transformers computes rotary angles as a float32 product of positions, and a position
    above 2,048 has more than 10 bits.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision == "tf32"
    if allowed:
        matmul.allow_tf32 = True
    try:
        yield
    finally:
        if allowed:
            matmul.allow_tf32 = before


def logits(hidden: Tensor, head: Tensor, columns: int, precision: torch.dtype) -> Tensor:
    """Return hidden [n, H] times the first rows of head [V, H] transposed, [n, columns], in `precision`.

    On CUDA, the rows of the result are views of whole tiles.
    """
    if hidden.is_cuda and hidden.dtype == head.dtype and precision == torch.float32:
        wide = hidden.new_empty(len(hidden), whole_tiles(columns), dtype=precision)
        # The columns beyond are computed too, if the head has them, because an odd number of columns is slow as well.
        rows = min(len(head), wide.shape[1])
        widened = {} if hidden.dtype == precision else {"out_dtype": precision}
        torch.mm(hidden, head[:rows].T, **widened, out=wide[:, :rows])
        return wide[:, :columns]
    hidden, head = hidden.to(precision), head[:columns]
    if head.dtype == precision:
        return linear(hidden, head)
    product = hidden.new_empty(len(hidden), columns)
    for start in range(0, columns, HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        torch.mm(hidden, head[rows].to(precision).T, out=product[:, rows])
    return product


def times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """Return gradient [n, V] times head [V, H], in at least float32; a narrower head is cast in parts."""
    if gradient.dtype.itemsize == 2:
        if gradient.is_cuda:
            return torch.mm(gradient, head, out_dtype=torch.float32)
        gradient = gradient.float()  # CPUs have no product of 16-bit numbers that is float32
    if head.dtype == gradient.dtype:
        return gradient @ head
    product = gradient.new_zeros(len(gradient), head.shape[1])
    for start in range(0, len(head), HEAD_ROWS):
        rows = slice(start, start + HEAD_ROWS)
        product.addmm_(gradient[:, rows], head[rows].to(gradient.dtype))
    return product


def add_head_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, first: bool) -> None:
    """Add gradient [n, V] transposed times hidden [n, H] to total [V, H]; overwrite `total` if it is the first."""
    # beta = 0 overwrites the buffer, so that it need not be zeroed.
    beta = 0 if first else 1
    if gradient.is_cuda and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(gradient.T.to(total.dtype), hidden.to(total.dtype), beta=beta)


def whole_tiles(columns: int) -> int:
    """Return the number of columns rounded up to whole tiles."""
    return -(-columns // TILE) * TILE


def fill_tiles(head: Tensor) -> Tensor:
    """Return a head [V, H] with rows of zeros up to whole tiles, so that `logits` of all V are fast on CUDA."""
    return pad(head, (0, 0, 0, whole_tiles(len(head)) - len(head)))

"""Multiply few tokens by a matrix in 4 bits in one Triton kernel, which reads the matrix once, as it is stored.

A program takes some rows of the matrix, and one of several parts of their columns, so that a GPU has enough programs to
read with; the parts are added up afterwards, always in the same order. Levels are multiplied as they are, which is
exact, and the sum of each group by its scale, in float32. tests/test_int4.py compares this, in Triton's interpreter on
the CPU, with products by the weights that the levels stand for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of the matrix that a program takes.
ROWS = 32
# The least tokens that a matrix product takes in Triton.
_FEWEST_TOKENS = 16
# How it is compiled: with multiplications and additions fused.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
# Programs that read at the same time: a few for each of the 132 processors of an H100.
_PROGRAMS = 512


# As one operation, which torch.compile does not look into.
@torch.library.custom_op("firstsight::multiply_int4", mutates_args=())
def multiply(inputs: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return inputs [..., K] times the matrix of `firstsight.models.int4.Int4Linear`, plus its bias: [..., N]."""
    tokens = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    rows, groups = scale.shape
    parts = max(1, min(groups, _PROGRAMS // triton.cdiv(rows, ROWS)))
    sums = tokens.new_empty(parts, len(tokens), rows, dtype=torch.float32)
    with torch.cuda.device_of(inputs):
        _multiply[(triton.cdiv(rows, ROWS), parts)](
            tokens,
            packed,
            scale,
            sums,
            len(tokens),
            rows,
            tokens.shape[1],
            tokens=max(_FEWEST_TOKENS, triton.next_power_of_2(len(tokens))),
            rows_of=ROWS,
            group=tokens.shape[1] // groups,
            groups_of=triton.cdiv(groups, parts),
            **OPTIONS,  # pyrefly: ignore[unexpected-keyword]
        )
    found = sums.sum(0)
    if bias is not None:
        found += bias
    return found.to(inputs.dtype).view(*inputs.shape[:-1], rows)


@multiply.register_fake
def _(inputs: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], len(packed))


@triton.jit
def _multiply(
    inputs,
    packed,
    scale,
    sums,
    count,
    rows,
    columns,
    tokens: tl.constexpr,
    rows_of: tl.constexpr,
    group: tl.constexpr,
    groups_of: tl.constexpr,
):
    row = tl.program_id(0) * rows_of + tl.arange(0, rows_of)
    token = tl.arange(0, tokens)
    column, word, shift = tl.arange(0, group), tl.arange(0, group // 8), tl.arange(0, 8) * 4
    first = tl.program_id(1) * groups_of
    total = tl.zeros((tokens, rows_of), tl.float32)
    for number in range(first, min(first + groups_of, columns // group)):
        x = tl.load(
            inputs + token[:, None] * columns + number * group + column[None, :], mask=token[:, None] < count, other=0.0
        )
        words = tl.load(
            packed + row[:, None] * (columns // 8) + number * (group // 8) + word[None, :],
            mask=row[:, None] < rows,
            other=0,
        )
        levels = tl.reshape((words[:, :, None] >> shift[None, None, :]) & 15, (rows_of, group)) - 8
        scales = tl.load(scale + row * (columns // group) + number, mask=row < rows, other=0.0).to(tl.float32)
        # Not in TF32, where inputs are float32.
        found = tl.dot(x, tl.trans(levels.to(x.dtype)), input_precision="ieee")
        total += found * scales[None, :]
    part = sums + tl.program_id(1) * count * rows
    tl.store(part + token[:, None] * rows + row[None, :], total, mask=(token[:, None] < count) & (row[None, :] < rows))

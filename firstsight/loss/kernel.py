"""The objective of `distillation_loss` for a chunk of logits in one Triton kernel, in place.

One program works on one row, a block of columns at a time, and passes over the row two or three times:

    1. the maxima and normalisers of softmax(z_s), softmax(z_s / T) and softmax(z_t / T)
    2. for divergences other than forward_kl: the mean of dD/dq under q, which the softmax's derivative subtracts
    3. D, the agreement, and the gradient for z_s, which overwrites z_s

Everything is float32. Differences of nearly equal terms are summed as series, so that they keep their accuracy where p
and q are alike; PyTorch's path takes float64 for that. tests/test_kernel.py compares this file, in Triton's interpreter
on the CPU, with the definition in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstsight.loss.divergences import Divergence

# Columns at a time, and how it is compiled: for 32 warps of 32 threads, so that a thread has 4 columns, and the numbers
# that it keeps for each of them fit its registers; and with multiplications and additions fused. On an H100, 8 warps
# with 8 columns a thread took 17 to 70% longer.
BLOCK = 4096
OPTIONS = {"num_warps": 32, "enable_fp_fusion": True}
# Numbers that a program of `scale` multiplies.
_SCALED = 4096

# Finite, because infinity minus infinity is NaN.
_LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
_NO_COLUMN: tl.constexpr = tl.constexpr(2**31 - 1)


def differentiate(
    logits: Tensor,
    answers: Tensor,
    teacher_logits: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    divergence: Divergence,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of L for a chunk of logits, and the sums [3] of D, CE and agreement.

    Args:
        logits: [n, V_s] float32, overwritten. Rows are contiguous, and what lies after each of them, the last included,
            up to the stride may be overwritten too, as with a slice of the columns of another tensor.
        answers: [n] int64, each below V_s.
        teacher_logits: [n, V] float32, laid out likewise, V <= V_s; None for CE alone.
        temperature, alpha, divergence: as in `distillation_loss`.
        dtype: of the gradient: float32, or a 16-bit one.

    Returns the gradient [n, V_s], which shares the memory of `logits`, and the sums in float32.
    """
    # In 16 bits, a row of the gradient takes the first half of the row of logits.
    gradient = logits.view(dtype)[:, : logits.shape[1]]
    sums = logits.new_empty(len(logits), 3)
    with torch.cuda.device_of(logits):
        _differentiate[(len(logits),)](
            logits,
            gradient,
            teacher_logits,
            answers,
            sums,
            logits.stride(0),
            gradient.stride(0),
            0 if teacher_logits is None else teacher_logits.stride(0),
            logits.shape[1],
            0 if teacher_logits is None else teacher_logits.shape[1],
            1 / temperature,
            divergence.beta,
            alpha * temperature,
            1 - alpha,
            kind="none" if teacher_logits is None else divergence.kind,
            block=BLOCK,
            **OPTIONS,  # pyrefly: ignore[unexpected-keyword]
        )
    return gradient, sums.sum(0)


def scale(numbers: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous tensor by a float32 scalar in place, and round the products to the tensor's dtype.

    PyTorch's `mul_` takes three times as long where the dtypes differ.
    """
    with torch.cuda.device_of(numbers):
        _scale[(triton.cdiv(numbers.numel(), _SCALED),)](numbers, factor, numbers.numel(), block=_SCALED)


@triton.jit
def _scale(numbers, factor, count, block: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    product = tl.load(numbers + places, mask=places < count).to(tl.float32) * tl.load(factor)
    tl.store(numbers + places, product.to(numbers.dtype.element_ty), mask=places < count)


@triton.jit
def _differentiate(
    logits,
    gradient,
    teacher,
    answers,
    sums,
    logits_stride,
    gradient_stride,
    teacher_stride,
    columns,
    shared,
    scale,  # 1 / T
    beta,
    soft_weight,  # alpha T: T^2 is in L, and 1 / T is the derivative of z / T
    hard_weight,  # 1 - alpha
    kind: tl.constexpr,
    block: tl.constexpr,
):
    # 64 bits: a chunk may hold more than 2^31 elements. Rows are read and written up to the next one, because a limit
    # that is no multiple of 4 would split vectors of 4 numbers; columns beyond the vocabulary are masked afterwards.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient += row * gradient_stride
    if kind != "none":
        teacher += row * teacher_stride
    sums += row * 3
    answer = tl.load(answers + row)
    answer_logit = tl.load(logits + answer)
    lanes = tl.arange(0, block)

    # Each lane keeps the maximum and sum of its own columns: fewer steps between threads, and smaller rounding errors.
    own_max = tl.full([block], _LOWEST, tl.float32)
    own_total = tl.zeros([block], tl.float32)
    q_max = tl.full([block], _LOWEST, tl.float32)
    q_total = tl.zeros([block], tl.float32)
    p_max = tl.full([block], _LOWEST, tl.float32)
    p_total = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        column = start + lanes
        z = tl.load(logits + column, mask=column < logits_stride)
        own_max, own_total = _include(own_max, own_total, z, column < columns, 1.0)
        if kind != "none":
            t = tl.load(teacher + column, mask=column < teacher_stride)
            q_max, q_total = _include(q_max, q_total, z, column < shared, scale)
            p_max, p_total = _include(p_max, p_total, t, column < shared, scale)
    own_max, own_total = _combine(own_max, own_total, 1.0)
    tl.store(sums + 1, own_max - answer_logit + tl.log(own_total))
    own_share = 1 / own_total

    if kind != "none":
        q_max, q_total = _combine(q_max, q_total, scale)
        p_max, p_total = _combine(p_max, p_total, scale)
        shift = tl.log(q_total / p_total)
        q_share, p_share = 1 / q_total, 1 / p_total
        # Under q, dD/dq = -p / q has the mean -1.
        mean = -1.0
        if kind != "forward_kl":
            slopes = tl.zeros([block], tl.float32)
            for start in range(0, columns, block):
                column = start + lanes
                z = tl.load(logits + column, mask=column < logits_stride)
                t = tl.load(teacher + column, mask=column < teacher_stride)
                _, slope, _ = _divergence(z - q_max, t - p_max, q_share, p_share, shift, scale, beta, kind)
                slopes += tl.where(column < shared, slope, 0.0)
            mean = tl.sum(slopes, axis=0)

    values = tl.zeros([block], tl.float32)
    # The least column of each lane at which student and teacher have their maximum.
    student_best = tl.full([block], _NO_COLUMN, tl.int32)
    teacher_best = tl.full([block], _NO_COLUMN, tl.int32)
    for start in range(0, columns, block):
        column = start + lanes
        z = tl.load(logits + column, mask=column < logits_stride)
        change = hard_weight * (tl.exp(z - own_max) * own_share - tl.where(column == answer, 1.0, 0.0))
        if kind != "none":
            inside = column < shared
            t = tl.load(teacher + column, mask=column < teacher_stride)
            q, slope, value = _divergence(z - q_max, t - p_max, q_share, p_share, shift, scale, beta, kind)
            change += tl.where(inside, soft_weight * (slope - q * mean), 0.0)
            values += tl.where(inside, value, 0.0)
            student_best = tl.minimum(student_best, tl.where(inside & (z == q_max), column, _NO_COLUMN))
            teacher_best = tl.minimum(teacher_best, tl.where(inside & (t == p_max), column, _NO_COLUMN))
        # A gradient in 16 bits overwrites columns that other threads of this program have to read first.
        tl.debug_barrier()
        tl.store(gradient + column, change.to(gradient.dtype.element_ty), mask=column < logits_stride)
    tl.store(sums, tl.sum(values, axis=0))
    agrees = tl.min(student_best, axis=0) == tl.min(teacher_best, axis=0)
    tl.store(sums + 2, tl.where(agrees & (shared > 0), 1.0, 0.0))


@triton.jit
def _include(largest, total, x, valid, scale):
    """Return the maxima and the sums of exp((x - maximum) scale) of each lane, with x among them where it is valid."""
    x = tl.where(valid, x, float("-inf"))
    above = x - largest
    change = tl.exp(-tl.abs(above) * scale)
    return tl.maximum(largest, x), tl.where(above > 0, total * change + 1, total + change)


@triton.jit
def _combine(largest, total, scale):
    """Return the maximum and the sum of exp((x - maximum) scale) of all lanes."""
    whole = tl.max(largest, axis=0)
    return whole, tl.sum(total * tl.exp((largest - whole) * scale), axis=0)


@triton.jit
def _divergence(z, t, q_share, p_share, shift, scale, beta, kind: tl.constexpr):
    """Return q, q dD/dq and D of each column, up to what is the same for all columns in dD/dq.

    Args:
        z, t: logits of student and teacher, less their row's maximum.
        q_share, p_share: one over the sums of exp(z scale) and of exp(t scale) in the row.
        shift: log(p_share / q_share).
    """
    q = tl.exp(z * scale) * q_share
    p = tl.exp(t * scale) * p_share
    ratio = (t - z) * scale + shift  # log(p / q)
    alike = tl.abs(ratio) < 1
    if kind == "forward_kl":
        # The terms of D are p log(p / q) - p + q: the sum of q - p is zero, and none of them is negative.
        slope = -p
        value = tl.where(alike, p * _excess(ratio), q - p + p * ratio)
    elif kind == "reverse_kl":
        slope = -q * ratio
        value = tl.where(alike, q * _excess(-ratio), p - q - q * ratio)
    else:
        # With p = q (1 + w), m = q (1 + beta w) and h(x) = (1 + x) log(1 + x) - x, the terms of D are
        # q (beta h(w) - h(beta w)). Where |log(p / q)| is large, log(m / q) is taken from the larger of p and q.
        w = _expm1(ratio)
        larger = tl.maximum(ratio, 0.0)
        rest = tl.log(beta * tl.exp(ratio - larger) + (1 - beta) * tl.exp(-larger))
        mixed = tl.where(alike, _log1p(beta * w), larger + rest)  # log(m / q)
        slope = -(1 - beta) * q * mixed
        near = q * (beta * _entropy(ratio, w) - _entropy(mixed, beta * w))
        value = tl.where(alike, near, beta * p * (ratio - larger - rest) - (1 - beta) * q * mixed)
    return q, slope, value


@triton.jit
def _excess(x):
    """Return exp(-x) - 1 + x for |x| < 1."""
    series = 1 / 39916800 * -x + 1 / 3628800
    series = series * -x + 1 / 362880
    series = series * -x + 1 / 40320
    series = series * -x + 1 / 5040
    series = series * -x + 1 / 720
    series = series * -x + 1 / 120
    series = series * -x + 1 / 24
    series = series * -x + 1 / 6
    series = series * -x + 1 / 2
    return x * x * series


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 for |x| < 1."""
    return x + _excess(-x)


@triton.jit
def _log1p(x):
    """Return log(1 + x) = 2 artanh(x / (2 + x)) for exp(-1) - 1 < x < exp(1) - 1."""
    s = x / (2 + x)
    square = s * s
    series = 1 / 19 * square + 1 / 17
    series = series * square + 1 / 15
    series = series * square + 1 / 13
    series = series * square + 1 / 11
    series = series * square + 1 / 9
    series = series * square + 1 / 7
    series = series * square + 1 / 5
    series = series * square + 1 / 3
    return 2 * s + 2 * s * square * series


@triton.jit
def _entropy(log, x):
    """Return (1 + x) log(1 + x) - x for |log| < 1, where log = log(1 + x)."""
    return log * x - _excess(-log)

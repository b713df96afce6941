"""Round a matrix to 4 bits so that its products with given inputs change least (GPTQ, arXiv 2210.17323).

Rounding to the nearest changes each weight least, whatever it is multiplied with. GPTQ rounds one row after the other,
and moves the error of each onto the rows that come after it, as far as the inputs make up for it.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

# Of the moments of inputs that are held at once.
MOST_BYTES = 2 << 30
# Levels of 4 bits.
LOWEST, HIGHEST = -8, 7
# Added to the diagonal of the inputs' moment, as a share of its mean: as in the paper.
_DAMPING = 0.01


def nearest(weights: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Round each weight to the nearest level of its block.

    Args:
        weights: float [K, N]; each column's K weights share a scale in blocks of `block`.

    Returns:
        levels int8 [K, N], and scales float32 [ceil(K / block), N].
    """
    levels, scales = np.empty(weights.shape, np.int8), []
    for start in range(0, len(weights), block):
        scales.append(_scale(weights[start : start + block]))
        levels[start : start + block] = _levels(weights[start : start + block], scales[-1])
    return levels, np.stack(scales)


def gptq(
    weights: np.ndarray,
    moment: np.ndarray,
    block: int,
    as_stored: Callable[[np.ndarray], np.ndarray] = lambda scale: scale,
) -> tuple[np.ndarray, np.ndarray]:
    """Round weights so that products with inputs of this second moment change little.

    Args:
        weights: float [K, N], as for `nearest`.
        moment: the mean of x x^T over inputs x, [K, K].
        as_stored: rounds scales, float32 [N], to the numbers that are stored of them.

    Returns:
        levels int8 [K, N], and scales float32 [ceil(K / block), N].
    """
    left, moment = weights.astype(np.float64), moment.astype(np.float64)
    moment[np.diag_indices_from(moment)] += _DAMPING * np.diag(moment).mean() + np.finfo(np.float32).tiny
    # Row k holds by how much an error of row k moves each row after it; its first entry scales the error.
    moves = np.linalg.cholesky(np.linalg.inv(moment)).T
    levels, scales = np.empty(weights.shape, np.int8), []
    for start in range(0, len(weights), block):
        end = min(start + block, len(weights))
        scales.append(as_stored(_scale(left[start:end])))
        errors = np.empty((end - start, weights.shape[1]))
        for row in range(start, end):
            levels[row] = _levels(left[row], scales[-1])
            errors[row - start] = (left[row] - levels[row] * scales[-1]) / moves[row, row]
            left[row + 1 : end] -= np.outer(moves[row, row + 1 : end], errors[row - start])
        left[end:] -= moves[start:end, end:].T @ errors
    return levels, np.stack(scales)


def parts(widths: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield names of matrices in groups whose moments take at most `MOST_BYTES`, or of one alone that takes more.

    `widths` are the numbers of inputs; each has two moments in float32, of visual and of text tokens.
    """
    part: list[str] = []
    size = 0
    for name, width in widths.items():
        needed = 2 * width**2 * np.dtype(np.float32).itemsize
        if part and size + needed > MOST_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += needed
    if part:
        yield part


def restored(levels: np.ndarray, scales: np.ndarray, block: int) -> np.ndarray:
    """Return the weights float32 [K, N] for which levels and scales stand."""
    return levels * np.repeat(scales, block, axis=0)[: len(levels)]


def packed(levels: np.ndarray, block: int) -> np.ndarray:
    """Return levels [K, N] as onnxruntime's MatMulNBits has them, uint8 [N, ceil(K / block), block / 2].

    A byte holds two levels, each plus 8, the first in its low half; the last block is filled with zeros.
    """
    rows, columns = levels.shape
    blocks = -(-rows // block)
    filled = np.zeros((blocks * block, columns), np.int8)
    filled[:rows] = levels
    halves = (filled - LOWEST).astype(np.uint8).T.reshape(columns, blocks, block // 2, 2)
    return halves[..., 0] | halves[..., 1] << 4


def _scale(weights: np.ndarray) -> np.ndarray:
    """Return a scale [N] for each column of [k, N], with which its largest weight becomes the lowest level."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)[0]
    return np.where(largest == 0, 1, largest / LOWEST).astype(np.float32)


def _levels(weights: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(weights / scale), LOWEST, HIGHEST)

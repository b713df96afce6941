"""Compare states and gradients that were computed in two ways, which differ by rounding at most."""

import torch
from torch import Tensor

# How far a tensor may be from another, as a share of that one's norm. In bfloat16, gradients computed twice differ by
# 0.01, because sums are in another order.
_TOLERANCE = 0.1


def random_gradient(states: Tensor) -> Tensor:
    """Return a gradient of final hidden states to compare gradients of weights by, the same for each shape.

    Not the states themselves: the norm before them makes their own length all but constant, so that what is left of its
    gradient is rounding.
    """
    return torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor is as near to another as one that was computed in another order."""
    return bool((found.float() - expected.float()).norm() <= _TOLERANCE * expected.float().norm())

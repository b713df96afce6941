"""What is known of a teacher at the answer positions, and the logits that follow from it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from firstsight.loss import products


class Teacher(Protocol):
    """The teacher at the N answer positions, whatever is known of it there."""

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        """Logits [n, shared] of the first `shared` tokens for these rows, in `precision`."""


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher by its final hidden states [N, H_t] and its output head [V_t, H_t]: exact."""

    hidden: Tensor
    head: Tensor

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        return products.logits(self.hidden[rows].to(precision), self.head[:shared])

    @staticmethod
    def bytes_per_token(width: int, number: int) -> int:
        """Return the bytes of one token's hidden state of `width` numbers, `number` bytes each."""
        return width * number


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher by its k best tokens: `ids` [N, k], their `best` logits [N, k], and log-sum-exp [N] over all V.

    The probability the k leave over is spread evenly over the other V - k tokens, as one logit for all of them: exact
    in total at T = 1, and defined at every T. What that loses is measured when the targets are built.
    """

    ids: Tensor
    best: Tensor
    logsumexp: Tensor

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        best, whole = self.best[rows].to(precision), self.logsumexp[rows, None].to(precision)
        # log(exp(whole) - sum exp(best)) - log(V - k); rounding may leave nothing over.
        left = torch.log1p(-torch.exp(best - whole).sum(-1, keepdim=True).clamp(max=1 - 1e-6))
        rest = whole + left - math.log(max(shared - best.shape[-1], 1))
        # None of the others is likelier than the k best.
        rest = torch.minimum(rest, best.amin(-1, keepdim=True))
        return rest.expand(-1, shared).scatter(-1, self.ids[rows].long(), best)

    @staticmethod
    def bytes_per_token(k: int) -> int:
        """Return the bytes of one token's `ids` (int32), `best` and `logsumexp` (float32)."""
        return k * (4 + 4) + 4

"""The teacher's logits z_t at the answer tokens, exact from hidden states or approximate from the top k."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from firstsight.loss import products


class Teacher(Protocol):
    """Provide the teacher's logits at the N answer tokens of a batch."""

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        """Return logits [n, shared] over the first `shared` token ids for these rows of the batch, in `precision`."""


@dataclass(frozen=True)
class HiddenTeacher:
    """Compute exact logits from the final hidden states [N, H_t] and the output head [V_t, H_t].

    Only the head's rows of shared tokens count; on CUDA, more rows up to whole tiles (`products.TILE`) make it faster.
    """

    hidden: Tensor
    head: Tensor

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        return products.logits(self.hidden[rows], self.head, shared, precision)

    @staticmethod
    def bytes_per_token(width: int, number: int) -> int:
        """Return the bytes of one token's hidden state of `width` numbers, `number` bytes each."""
        return width * number


@dataclass(frozen=True)
class TopKTeacher:
    """Approximate logits from the k largest: `ids` [N, k], their logits `best` [N, k], and `logsumexp` [N] over all V.

    The remaining probability is spread evenly over the other V - k tokens, which get one logit: at T = 1 their total is
    exact. The error is measured when the targets are built (`firstsight.distillation.builder`).
    """

    ids: Tensor
    best: Tensor
    logsumexp: Tensor

    def logits(self, rows: slice, shared: int, precision: torch.dtype) -> Tensor:
        best, logsumexp = self.best[rows].to(precision), self.logsumexp[rows, None].to(precision)
        # log(exp(logsumexp) - sum exp(best)) - log(V - k); clamped, because rounding may leave nothing.
        log_remaining = torch.log1p(-torch.exp(best - logsumexp).sum(-1, keepdim=True).clamp(max=1 - 1e-6))
        rest = logsumexp + log_remaining - math.log(max(shared - best.shape[-1], 1))
        # No other token is more probable than the k best.
        rest = torch.minimum(rest, best.amin(-1, keepdim=True))
        return rest.expand(-1, shared).scatter(-1, self.ids[rows].long(), best)

    @staticmethod
    def bytes_per_token(k: int) -> int:
        """Return the bytes of one token's `ids` (int32), `best` and `logsumexp` (float32)."""
        return k * (4 + 4) + 4

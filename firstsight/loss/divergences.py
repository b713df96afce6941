"""The divergences D of the objective (`distillation_loss`), each with its gradient.

To add one, write a function like `_forward_kl` below, which returns gradient and value, and enter it in `DIVERGENCES`;
add its terms to `_divergence` in firstsight/loss/kernel.py and its name to `Train.divergence` in
firstsight/core/params.py; add it to `DIVERGENCES` and its definition to `logits_oracle` in tests/test_loss.py, which
checks value and gradient.

With p the teacher's distribution over the shared vocabulary at temperature T, and q the student's:

    forward_kl   KL(p || q)                                              mode-covering
    reverse_kl   KL(q || p)                                              mode-seeking
    jsd          beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q

(the generalised Jensen-Shannon divergence of Agarwal et al., 2023, arXiv:2306.13649, with 0 < beta < 1).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


@dataclass(frozen=True)
class Divergence:
    """Name a divergence of `DIVERGENCES`; `beta` is the teacher's weight in the mixture of "jsd"."""

    kind: str
    beta: float = 0.5


FORWARD_KL = Divergence("forward_kl")


# Each function takes log p and log q [n, V], which it may overwrite, because allocating every term is slow on a CPU. It
# returns the gradient of D for z_s / T [n, V], and D summed over rows. Terms that sum to zero in each row, such as
# q - p, are added to D: to first order they cancel the rounding error of the softmax normalisers, which at high
# temperatures is not small compared with D.


def _forward_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    p, ratio = log_p.exp(), log_p.sub_(log_q)
    gradient = log_q.exp_().sub_(p)
    return gradient, p.mul_(ratio).add_(gradient).sum()


def _reverse_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    q, ratio = log_q.exp(), log_q.sub_(log_p)
    weighted = q * ratio
    gradient = ratio.sub_(weighted.sum(-1, keepdim=True)).mul_(q)
    return gradient, weighted.add_(log_p.exp_()).sub_(q).sum()


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q, m = log_p.exp(), log_q.exp(), log_m.exp()
    ratio = log_q - log_m
    # dD/dq = (1 - beta) log(q / m); the terms through m cancel.
    gradient = (1 - beta) * q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return gradient, (beta * (p * (log_p - log_m) + m - p) + (1 - beta) * (q * ratio + m - q)).sum()


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(p || q) at temperature T, summed over rows of logits [n, V]."""
    return _forward_kl(log_softmax(teacher_logits / temperature, -1), log_softmax(student_logits / temperature, -1), 0)[
        1
    ]


DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}

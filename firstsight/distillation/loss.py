"""The distillation loss, exact and in chunks.

For the N answer tokens of a batch, with student logits z_s and teacher logits z_t over the shared vocabulary V,

    sum_n  alpha T^2 D( softmax(z_t / T), softmax(z_s / T) )  +  (1 - alpha) CE(z_s, y)

(Hinton et al., 2015, arXiv:1503.02531; T^2 keeps the size of the soft gradient as T grows). D runs over V alone,
renormalised on both sides; CE runs over the student's whole vocabulary, so that alpha = 0 is exactly the student's
own fine-tuning loss. The sum is divided by whoever knows the answer tokens of the whole optimizer step.

With p the teacher's distribution and q the student's, D is one of

    forward_kl   KL(p || q)                                              covers all the teacher does
    reverse_kl   KL(q || p)                                              keeps to what the teacher does most
    jsd          beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q

(the generalised Jensen-Shannon divergence of Agarwal et al., 2023, arXiv:2306.13649, with 0 < beta < 1).

Logits are made from hidden states chunk by chunk, in float32, and the gradients of hidden states and head are made on
the way forward: no (N x vocabulary) buffer exists, and backward only scales what is already there.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

# Rows of logits alive at once. At a vocabulary of 152,000 a chunk's float32 logits take 156 MB a model.
CHUNK = 256


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
        return linear(self.hidden[rows].to(precision), self.head[:shared].to(precision))


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
        return rest.expand(-1, shared).scatter(-1, self.ids[rows].long(), best)


@dataclass(frozen=True)
class Divergence:
    """Which D, and beta for "jsd"."""

    kind: str
    beta: float = 0.5


@dataclass(frozen=True)
class Loss:
    """Sums over answer tokens: scalars in float32, or float64 for such inputs. Only `total` carries a gradient.

    `agreement` counts the tokens at which the student's likeliest token of the shared vocabulary is the teacher's.
    """

    total: Tensor
    divergence: Tensor
    ce: Tensor
    agreement: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    answers: Tensor,
    teacher: Teacher | None,
    *,
    shared_vocabulary: int,
    temperature: float,
    alpha: float,
    divergence: Divergence = Divergence("forward_kl"),
) -> Loss:
    """The loss summed over N answer tokens.

    Args:
        student_hidden: [N, H] final hidden states (after the last norm) that predict the answer tokens.
        student_head: [V_s, H] the student's output head; gradients flow to it unless it is frozen.
        answers: [N] int64 answer tokens, each below V_s.
        teacher: the teacher at these tokens; None, with alpha 0, for plain fine-tuning.
        shared_vocabulary: V, the tokens that both models have; D runs over logits [:V] of each.
        temperature: T > 0. It enters D alone.
        alpha: the weight of the teacher, in [0, 1].
        divergence: which D.

    Raises:
        ValueError: alpha above 0 without a teacher.
    """
    if teacher is None and alpha > 0:
        raise ValueError(f"alpha = {alpha:g} gives weight to a teacher, and there is none")
    # Autocast would round the logits to 16 bits.
    with torch.autocast(student_hidden.device.type, enabled=False):
        return Loss(
            *_Chunked.apply(
                student_hidden, student_head, answers, teacher, shared_vocabulary, temperature, alpha, divergence
            )
        )


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden, head, answers, teacher, shared, temperature, alpha, divergence):
        # float32 at least; float64 stays, so that the gradient can be checked numerically.
        precision = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        weight = head.to(precision)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        # Summed in full precision over the chunks, whatever the head's own.
        head_grad = torch.zeros_like(weight) if wants_head else None
        soft, ce, agreement = hidden.new_zeros(3, dtype=precision)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            chunk = hidden[rows].to(precision)
            logits = linear(chunk, weight)
            gradient, chunk_ce = _cross_entropy(logits, answers[rows])
            gradient *= 1 - alpha
            ce += chunk_ce
            if teacher is not None:
                teacher_logits = teacher.logits(rows, shared, precision)
                log_p = log_softmax(teacher_logits / temperature, dim=-1)
                log_q = log_softmax(logits[:, :shared] / temperature, dim=-1)
                soft_gradient, chunk_soft = _DIVERGENCES[divergence.kind](log_p, log_q, divergence.beta)
                # T^2 of the loss, 1 / T of the inner derivative.
                gradient[:, :shared] += alpha * temperature * soft_gradient
                soft += chunk_soft
                agreement += (logits[:, :shared].argmax(-1) == teacher_logits.argmax(-1)).sum()
            if wants_hidden:
                hidden_grad[rows] = (gradient @ weight).to(hidden.dtype)
            if wants_head:
                head_grad.addmm_(gradient.T, chunk)
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype) if wants_head else None)
        ctx.mark_non_differentiable(soft, ce, agreement)
        return alpha * temperature**2 * soft + (1 - alpha) * ce, soft, ce, agreement

    @staticmethod
    def backward(ctx, total_grad, *_):
        hidden_grad, head_grad = ctx.saved_tensors
        return (
            hidden_grad * total_grad.to(hidden_grad.dtype) if hidden_grad is not None else None,
            head_grad * total_grad.to(head_grad.dtype) if head_grad is not None else None,
            *[None] * 6,
        )


def _cross_entropy(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """CE summed over the rows of logits [n, V], and its gradient softmax(z) - onehot(y) [n, V]."""
    log_probabilities = log_softmax(logits, dim=-1)
    loss = -log_probabilities.gather(-1, answers[:, None]).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(-1, answers[:, None], -torch.ones_like(gradient[:, :1]))
    return gradient, loss


# Each takes log p and log q [n, V] and returns the gradient of D for the student's logits over T [n, V], and D summed
# over rows. Terms that sum to zero, such as q - p, are added to D: they cancel, to first order, the rounding of the
# softmax normalisers, which at high temperatures is not small beside D.


def _forward_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    gradient = log_q.exp() - p
    return gradient, (p * (log_p - log_q) + gradient).sum()


def _reverse_kl(log_p: Tensor, log_q: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    gradient = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return gradient, (q * ratio + log_p.exp() - q).sum()


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    p, q, m = log_p.exp(), log_q.exp(), log_m.exp()
    ratio = log_q - log_m
    # dD/dq = (1 - beta) log(q / m): what m contributes cancels.
    gradient = (1 - beta) * q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return gradient, (beta * (p * (log_p - log_m) + m - p) + (1 - beta) * (q * ratio + m - q)).sum()


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(p || q) at temperature T, summed over rows of logits [n, V]."""
    return _forward_kl(log_softmax(teacher_logits / temperature, -1), log_softmax(student_logits / temperature, -1), 0)[
        1
    ]


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}

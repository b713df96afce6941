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
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, log_softmax

# Rows of logits alive at once, of each model: at a vocabulary of 152,000 they take 156 MB in float32. Fewer would
# stream the head and its gradient through memory more often, more would buy little.
CHUNK = 256
# Rows that the softmaxes work on at once. On a CPU their temporaries then stay in cache, which is what makes them fast;
# a GPU wants fewer, larger kernels.
_BLOCK = {"cpu": 8, "cuda": 64}
# Rows of a 16-bit head converted at once.
_HEAD_ROWS = 16_384


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
        return _logits(self.hidden[rows].to(precision), self.head[:shared])


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
    # Without gradients, none are made; with them, autocast would round the logits to 16 bits.
    head = student_head if torch.is_grad_enabled() else student_head.detach()
    objective = _Objective(teacher, shared_vocabulary, temperature, alpha, divergence)
    with torch.autocast(student_hidden.device.type, enabled=False):
        return Loss(*_Chunked.apply(student_hidden, head, answers, objective))


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden, head, answers, objective):
        ctx.save_for_backward(hidden, head, answers)
        ctx.objective, ctx.wanted = objective, ctx.needs_input_grad[:2]
        sums, *ctx.gradients = _sums_and_gradients(hidden, head, answers, objective, *ctx.wanted)
        soft, ce, agreement = sums
        ctx.mark_non_differentiable(soft, ce, agreement)
        return objective.alpha * objective.temperature**2 * soft + (1 - objective.alpha) * ce, soft, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad, *_):
        # The gradients are scaled in place and given away, which saves a copy of the head's; a second backward pass
        # over a retained graph makes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, *gradients = _sums_and_gradients(*ctx.saved_tensors, ctx.objective, *ctx.wanted)
        hidden_grad, head_grad = (None if one is None else one.mul_(total_grad) for one in gradients)
        if hidden_grad is not None:
            hidden_grad = hidden_grad.to(ctx.saved_tensors[0].dtype)
        return hidden_grad, head_grad, None, None


@dataclass(frozen=True)
class _Objective:
    """The arguments of the loss that are no tensors of the student."""

    teacher: Teacher | None
    shared: int
    temperature: float
    alpha: float
    divergence: Divergence


def _sums_and_gradients(
    hidden: Tensor, head: Tensor, answers: Tensor, objective: _Objective, wants_hidden: bool, wants_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums [3] of divergence, CE and agreement, and the gradients [N, H] and [V_s, H] that are wanted."""
    # float32 at least; float64 stays, so that the gradient can be checked numerically.
    precision = torch.promote_types(hidden.dtype, torch.float32)
    hidden_grad = torch.empty_like(hidden, dtype=precision) if wants_hidden else None
    # Summed in full precision over the chunks, whatever the head's own.
    head_grad = torch.empty_like(head, dtype=precision) if wants_head else None
    sums = hidden.new_zeros(3, dtype=precision)
    block = _BLOCK[hidden.device.type]
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = hidden[rows].to(precision)
        logits = _logits(chunk, head)
        known = objective.teacher and objective.teacher.logits(rows, objective.shared, precision)
        for first in range(0, len(chunk), block):
            part = slice(first, first + block)
            teacher_logits = None if known is None else known[part]
            # The logits' gradient takes the logits' place.
            sums += _differentiate(logits[part], answers[rows][part], teacher_logits, objective)
        if wants_hidden:
            hidden_grad[rows] = _times_head(logits, head)
        if wants_head:
            # The first product starts the sum: a buffer of zeros would be written and read for nothing.
            head_grad.addmm_(logits.T, chunk, beta=min(start, 1))
    if wants_head and not len(hidden):
        head_grad.zero_()
    return sums, hidden_grad, head_grad.to(head.dtype) if wants_head else None


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden [n, H] times head [V, H] transposed, in the precision of `hidden`; no whole copy of a narrower head."""
    if head.dtype == hidden.dtype:
        return linear(hidden, head)
    logits = hidden.new_empty(len(hidden), len(head))
    for start in range(0, len(head), _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        torch.mm(hidden, head[rows].to(hidden.dtype).T, out=logits[:, rows])
    return logits


def _times_head(gradient: Tensor, head: Tensor) -> Tensor:
    """gradient [n, V] times head [V, H], in the precision of `gradient`; no whole copy of a narrower head."""
    if head.dtype == gradient.dtype:
        return gradient @ head
    product = gradient.new_zeros(len(gradient), head.shape[1])
    for start in range(0, len(head), _HEAD_ROWS):
        rows = slice(start, start + _HEAD_ROWS)
        product.addmm_(gradient[:, rows], head[rows].to(gradient.dtype))
    return product


def _differentiate(logits: Tensor, answers: Tensor, teacher_logits: Tensor | None, objective: _Objective) -> Tensor:
    """Replace logits [n, V_s] by the loss's gradient for them; returns the sums [3] of `_sums_and_gradients`."""
    shared, temperature, alpha = objective.shared, objective.temperature, objective.alpha
    soft, agreement = logits.new_zeros(2)
    soft_gradient = None
    if teacher_logits is not None:
        agreement = (logits[:, :shared].argmax(-1) == teacher_logits.argmax(-1)).sum()
        # The gradient of forward_kl is q - p. In those of the others terms cancel, where p and q are alike to a
        # thousandth of themselves: float32 is too short for that.
        precision = torch.float64 if objective.divergence.kind != "forward_kl" else logits.dtype
        log_p = log_softmax(teacher_logits.div_(temperature), dim=-1, dtype=precision)
        log_q = log_softmax(logits[:, :shared] / temperature, dim=-1, dtype=precision)
        soft_gradient, soft = _DIVERGENCES[objective.divergence.kind](log_p, log_q, objective.divergence.beta)
    log_probabilities = log_softmax(logits, dim=-1)
    ce = -log_probabilities.gather(-1, answers[:, None]).sum()
    torch.exp(log_probabilities, out=logits).mul_(1 - alpha)
    logits.scatter_add_(-1, answers[:, None], logits.new_full((len(logits), 1), alpha - 1))
    if soft_gradient is not None:
        # T^2 of the loss, 1 / T of the inner derivative.
        logits[:, :shared].add_(soft_gradient, alpha=alpha * temperature)
    return torch.stack([soft.to(ce.dtype), ce, agreement.to(ce.dtype)])


# Each takes log p and log q [n, V], and overwrites them: fresh memory for every term is what takes time on a CPU. It
# returns the gradient of D for the student's logits over T [n, V], and D summed over rows. Terms that sum to zero, such
# as q - p, are added to D: they cancel, to first order, the rounding of the softmax normalisers, which at high
# temperatures is not small beside D.


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
    # dD/dq = (1 - beta) log(q / m): what m contributes cancels.
    gradient = (1 - beta) * q * (ratio - (q * ratio).sum(-1, keepdim=True))
    return gradient, (beta * (p * (log_p - log_m) + m - p) + (1 - beta) * (q * ratio + m - q)).sum()


def forward_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """KL(p || q) at temperature T, summed over rows of logits [n, V]."""
    return _forward_kl(log_softmax(teacher_logits / temperature, -1), log_softmax(student_logits / temperature, -1), 0)[
        1
    ]


_DIVERGENCES = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}

"""The distillation loss, exact and in chunks.

For the N answer tokens of a batch, with student logits z_s and teacher logits z_t over the shared vocabulary V,

    sum_n  alpha T^2 D( softmax(z_t / T), softmax(z_s / T) )  +  (1 - alpha) CE(z_s, y)

(Hinton et al., 2015, arXiv:1503.02531; T^2 keeps the size of the soft gradient as T grows). D, one of `divergences`,
runs over V alone, renormalised on both sides; CE runs over the student's whole vocabulary, so that alpha = 0 is exactly
the student's own fine-tuning loss. The caller divides the sum by the answer tokens of the whole optimizer step.

Logits are made from hidden states chunk by chunk, in float32, and the gradients of hidden states and head are made on
the way forward: no (N x vocabulary) buffer exists, and backward only scales what is already there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from firstsight.loss import products
from firstsight.loss.divergences import DIVERGENCES, FORWARD_KL, Divergence
from firstsight.loss.products import CHUNK
from firstsight.loss.teachers import Teacher

# Rows that the softmaxes work on at once. On a CPU their temporaries then stay in cache, which is what makes them fast;
# a GPU wants fewer, larger kernels.
BLOCK = {"cpu": 8, "cuda": 64}


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
    divergence: Divergence = FORWARD_KL,
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
    block = BLOCK[hidden.device.type]
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, start + CHUNK)
        chunk = hidden[rows].to(precision)
        logits = products.logits(chunk, head)
        known = objective.teacher and objective.teacher.logits(rows, objective.shared, precision)
        for first in range(0, len(chunk), block):
            part = slice(first, first + block)
            teacher_logits = None if known is None else known[part]
            # The logits' gradient takes the logits' place.
            sums += _differentiate(logits[part], answers[rows][part], teacher_logits, objective)
        if wants_hidden:
            hidden_grad[rows] = products.times_head(logits, head)
        if wants_head:
            # The first product starts the sum: a buffer of zeros would be written and read for nothing.
            head_grad.addmm_(logits.T, chunk, beta=min(start, 1))
    if wants_head and not len(hidden):
        head_grad.zero_()
    return sums, hidden_grad, head_grad.to(head.dtype) if wants_head else None


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
        soft_gradient, soft = DIVERGENCES[objective.divergence.kind](log_p, log_q, objective.divergence.beta)
    log_probabilities = log_softmax(logits, dim=-1)
    ce = -log_probabilities.gather(-1, answers[:, None]).sum()
    torch.exp(log_probabilities, out=logits).mul_(1 - alpha)
    logits.scatter_add_(-1, answers[:, None], logits.new_full((len(logits), 1), alpha - 1))
    if soft_gradient is not None:
        # T^2 of the loss, 1 / T of the inner derivative.
        logits[:, :shared].add_(soft_gradient, alpha=alpha * temperature)
    return torch.stack([soft.to(ce.dtype), ce, agreement.to(ce.dtype)])

"""The distillation loss, exact and in chunks.

For the N answer tokens of a batch, with student logits z_s and teacher logits z_t over the shared vocabulary V,

    sum_n  alpha T^2 KL( softmax(z_t / T) || softmax(z_s / T) )  +  (1 - alpha) CE(z_s, y)

(Hinton et al., 2015, arXiv:1503.02531; T^2 keeps the size of the soft gradient as T grows). KL runs over V alone,
renormalised on both sides; CE runs over the student's whole vocabulary, so that alpha = 0 is exactly the student's
own fine-tuning loss. The sum is divided by whoever knows the answer tokens of the whole optimizer step.

Logits are made from hidden states chunk by chunk, in float32, and the gradients of hidden states and head are made on
the way forward: no (N x vocabulary) buffer exists, and backward only scales what is already there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

# Rows of logits alive at once. At a vocabulary of 152,000 a chunk's float32 logits take 156 MB a model.
CHUNK = 256


@dataclass(frozen=True)
class Teacher:
    """What the loss needs of the teacher: hidden states [N, H_t] at the answer positions, and head [V_t, H_t]."""

    hidden: Tensor
    head: Tensor


@dataclass(frozen=True)
class Loss:
    """Sums over answer tokens: scalars in float32, or float64 for such inputs. Only `total` carries a gradient.

    `agreement` counts the tokens at which the student's likeliest token of the shared vocabulary is the teacher's.
    """

    total: Tensor
    kl: Tensor
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
) -> Loss:
    """The loss summed over N answer tokens.

    Args:
        student_hidden: [N, H] final hidden states (after the last norm) that predict the answer tokens.
        student_head: [V_s, H] the student's output head; gradients flow to it unless it is frozen.
        answers: [N] int64 answer tokens, each below V_s.
        teacher: hidden states and head of the teacher; None, with alpha 0, for plain fine-tuning.
        shared_vocabulary: V, the tokens that both models have; KL runs over logits [:V] of each.
        temperature: T > 0. It enters KL alone.
        alpha: the weight of the teacher, in [0, 1].

    Raises:
        ValueError: alpha above 0 without a teacher.
    """
    if teacher is None and alpha > 0:
        raise ValueError(f"alpha = {alpha:g} gives weight to a teacher, and there is none")
    teacher_hidden, teacher_head = (teacher.hidden, teacher.head) if teacher else (None, None)
    # Autocast would round the logits to 16 bits.
    with torch.autocast(student_hidden.device.type, enabled=False):
        return Loss(
            *_Chunked.apply(
                student_hidden,
                student_head,
                answers,
                teacher_hidden,
                teacher_head,
                shared_vocabulary,
                temperature,
                alpha,
            )
        )


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden, head, answers, teacher_hidden, teacher_head, shared, temperature, alpha):
        # float32 at least; float64 stays, so that the gradient can be checked numerically.
        precision = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        weight = head.to(precision)
        teacher_weight = teacher_head[:shared].to(precision) if teacher_head is not None else None
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        # Summed in full precision over the chunks, whatever the head's own.
        head_grad = torch.zeros_like(weight) if wants_head else None
        kl, ce, agreement = hidden.new_zeros(3, dtype=precision)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            chunk = hidden[rows].to(precision)
            logits = linear(chunk, weight)
            gradient, chunk_ce = _cross_entropy(logits, answers[rows])
            gradient *= 1 - alpha
            ce += chunk_ce
            if teacher_hidden is not None:
                teacher_logits = linear(teacher_hidden[rows].to(precision), teacher_weight)
                soft_gradient, chunk_kl = _forward_kl(logits[:, :shared], teacher_logits, temperature)
                # d/dz of T^2 KL is T (q - p).
                gradient[:, :shared] += alpha * temperature * soft_gradient
                kl += chunk_kl
                agreement += (logits[:, :shared].argmax(-1) == teacher_logits.argmax(-1)).sum()
            if wants_hidden:
                hidden_grad[rows] = (gradient @ weight).to(hidden.dtype)
            if wants_head:
                head_grad.addmm_(gradient.T, chunk)
        ctx.save_for_backward(hidden_grad, head_grad.to(head.dtype) if wants_head else None)
        ctx.mark_non_differentiable(kl, ce, agreement)
        return alpha * temperature**2 * kl + (1 - alpha) * ce, kl, ce, agreement

    @staticmethod
    def backward(ctx, total_grad, *_):
        hidden_grad, head_grad = ctx.saved_tensors
        return (
            hidden_grad * total_grad.to(hidden_grad.dtype) if hidden_grad is not None else None,
            head_grad * total_grad.to(head_grad.dtype) if head_grad is not None else None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _cross_entropy(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """CE summed over the rows of logits [n, V], and its gradient softmax(z) - onehot(y) [n, V]."""
    log_probabilities = log_softmax(logits, dim=-1)
    loss = -log_probabilities.gather(-1, answers[:, None]).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(-1, answers[:, None], -torch.ones_like(gradient[:, :1]))
    return gradient, loss


def _forward_kl(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) at temperature T summed over rows of logits [n, V], and q - p [n, V], its gradient times T."""
    log_q = log_softmax(student / temperature, dim=-1)
    log_p = log_softmax(teacher / temperature, dim=-1)
    p = log_p.exp()
    gradient = log_q.exp() - p
    # The sum of q - p is zero, and adding it cancels, to first order, the rounding of either softmax's normaliser:
    # at high temperatures KL is small and that rounding is not.
    loss = (p * (log_p - log_q) + gradient).sum()
    return gradient, loss

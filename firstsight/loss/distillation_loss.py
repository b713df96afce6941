"""The distillation objective, computed exactly and in chunks of answer tokens.

For the N answer tokens y_n of a batch, with student logits z_s and teacher logits z_t,

    L = sum_n  alpha T^2 D( softmax(z_t[:V] / T), softmax(z_s[:V] / T) )  +  (1 - alpha) CE(z_s, y_n)

(Hinton et al., 2015, arXiv:1503.02531; T^2 keeps the gradient of D at one scale as T grows). D is one of `divergences`,
over the V tokens that both models have. CE runs over the student's whole vocabulary, so that alpha = 0 is supervised
fine-tuning. The caller divides L by the number of answer tokens of the optimizer step.

Logits are computed from hidden states chunk by chunk, in float32, and the gradients for hidden states and head in the
same pass: no [N, vocabulary] buffer is allocated, and backward only scales these gradients. Between logits and their
gradient, a chunk takes one of two ways: PyTorch's, in this file, which runs everywhere and is the one to read; or on
CUDA one Triton kernel, `kernel`. The other files of this folder: `divergences`, the choices of D; `teachers`, where z_t
comes from; `products`, products with an output head.
"""

import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from firstsight.core.processes import is_main_process
from firstsight.core.stage import log
from firstsight.loss import products
from firstsight.loss.divergences import DIVERGENCES, FORWARD_KL, Divergence
from firstsight.loss.products import CHUNK
from firstsight.loss.teachers import Teacher

# Bytes of logits in float32 per softmax: few on a CPU, so that temporaries stay in its cache; more on a GPU, for fewer
# and larger kernels. At a vocabulary of 152,000, that is 8 tokens and 64.
_BLOCK_BYTES = {"cpu": 5_000_000, "cuda": 40_000_000}
# Answer tokens a chunk: fewer than CHUNK after memory did not suffice, so that later steps do not fail first.
_chunk = dict(CHUNK)


@dataclass(frozen=True)
class Loss:
    """Hold sums over answer tokens: scalars in float32, or float64 for float64 inputs. Only `total` has a gradient.

    `total` is L; `divergence` and `ce` are the sums of D and CE; `agreement` counts the answer tokens at which student
    and teacher have the same argmax over the shared vocabulary.
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
    exchanged: tuple[int, int] | None = None,
) -> Loss:
    """Compute the objective L of this module, summed over N answer tokens.

    Args:
        student_hidden: [N, H] final hidden states (after the last norm) that predict the answer tokens.
        student_head: [V_s, H] the student's output head; it gets a gradient unless it is frozen.
        answers: [N] int64 answer tokens, each below V_s.
        teacher: the teacher at these tokens; None, with alpha 0, for supervised fine-tuning.
        shared_vocabulary: V; the token ids below it mean the same to both models.
        temperature: T > 0; CE is computed at temperature 1.
        alpha: the weight of D, in [0, 1].
        divergence: D.
        exchanged: two tokens of the student that stand for each other (`firstsight.loss.vocabulary`), or None.

    Raises:
        ValueError: alpha is above 0 and teacher is None.
    """
    if teacher is None and alpha > 0:
        raise ValueError(f"expected a teacher, because alpha is {alpha:g}, found None; pass one or set alpha to 0")
    # Under no_grad, no gradient for the head is computed. Autocast is disabled: it would round the logits to 16 bits.
    # On CUDA it allows that operands are rounded, to TF32: hidden states that it computed are good to fewer bits.
    head = student_head if torch.is_grad_enabled() else student_head.detach()
    rounded = student_hidden.is_cuda and torch.is_autocast_enabled("cuda")
    objective = _Objective(teacher, shared_vocabulary, temperature, alpha, divergence, exchanged, rounded)
    if exchanged is not None:
        first, second = exchanged
        answers = torch.where(answers == first, second, torch.where(answers == second, first, answers))
    with torch.autocast(student_hidden.device.type, enabled=False):
        return Loss(*_ChunkedLoss.apply(student_hidden, head, answers, objective))


class _ChunkedLoss(torch.autograd.Function):
    """Compute the loss and its gradients in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden, head, answers, objective):
        ctx.save_for_backward(hidden, head, answers)
        ctx.objective, ctx.needs_gradients = objective, ctx.needs_input_grad[:2]
        sums, *ctx.gradients = _sums_and_gradients(hidden, head, answers, objective, *ctx.needs_gradients)
        divergence, ce, agreement = sums
        ctx.mark_non_differentiable(divergence, ce, agreement)
        total = objective.alpha * objective.temperature**2 * divergence + (1 - objective.alpha) * ce
        return total, divergence, ce, agreement

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad, *_):
        # The gradients are scaled in place and released, which saves a copy of the head's; a second backward pass over
        # a retained graph computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, head, answers = ctx.saved_tensors
            _, *gradients = _sums_and_gradients(hidden, head, answers, ctx.objective, *ctx.needs_gradients)
        hidden_grad, head_grad = (None if one is None else _scaled(one, total_grad) for one in gradients)
        if hidden_grad is not None:
            hidden_grad = hidden_grad.to(ctx.saved_tensors[0].dtype)
        return hidden_grad, head_grad, None, None


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient by a scalar in place, and return it."""
    if gradient.dtype != factor.dtype and (kernel := _kernel(gradient.device.type)):
        kernel.scale(gradient, factor)
        return gradient
    return gradient.mul_(factor)


@dataclass(frozen=True)
class _Objective:
    """Hold the arguments of `distillation_loss` other than the student's tensors, and whether TF32 is allowed."""

    teacher: Teacher | None
    shared: int
    temperature: float
    alpha: float
    divergence: Divergence
    exchanged: tuple[int, int] | None
    rounded: bool


@dataclass
class _Found:
    """Hold sums [3] of D, CE and agreement and the gradients [N, H] and [V_s, H], of the chunks so far."""

    sums: Tensor
    hidden: Tensor | None = None
    head: Tensor | None = None


def _sums_and_gradients(
    hidden: Tensor, head: Tensor, answers: Tensor, objective: _Objective, needs_hidden: bool, needs_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sums [3] of D, CE and agreement, and the gradients [N, H] and [V_s, H]; None where not needed."""
    # At least float32; float64 inputs stay in float64, so that the gradient can be checked numerically.
    precision = torch.promote_types(hidden.dtype, torch.float32)
    found = _Found(hidden.new_zeros(3, dtype=precision))
    if needs_hidden:
        found.hidden = torch.empty_like(hidden, dtype=precision)
    device, start = hidden.device.type, 0
    with products.tf32(objective.rounded):
        while start < len(hidden):
            rows = slice(start, min(start + _chunk[device], len(hidden)))
            try:
                _add_chunk(found, rows, hidden, head, answers, objective, needs_head)
            except torch.OutOfMemoryError:
                if rows.stop - start == 1:
                    raise
                _chunk[device] = (rows.stop - start) // 2
                log.warning("loss: memory does not suffice for more than %d answer tokens at a time", _chunk[device])
            else:
                start = rows.stop
    if needs_head and not len(hidden):
        found.head = torch.zeros_like(head)
    return found.sums, found.hidden, found.head.to(head.dtype) if needs_head else None


def _add_chunk(
    found: _Found, rows: slice, hidden: Tensor, head: Tensor, answers: Tensor, objective: _Objective, needs_head: bool
) -> None:
    """Add the sums and gradients of these rows to `found`, or raise torch.OutOfMemoryError and leave it as it is."""
    precision, chunk = found.sums.dtype, hidden[rows]
    logits = products.logits(chunk, head, len(head), precision)
    _exchange(logits, objective.exchanged)
    teacher_logits = objective.teacher and objective.teacher.logits(rows, objective.shared, precision)
    if kernel := _kernel(logits.device.type) if precision == torch.float32 else None:
        # In bfloat16 if hidden states and head are, to be multiplied on the tensor cores. Float16 cannot hold the small
        # probabilities of a large vocabulary.
        narrow = hidden.dtype == head.dtype == torch.bfloat16
        gradient, sums = kernel.differentiate(
            logits,
            answers[rows],
            teacher_logits,
            temperature=objective.temperature,
            alpha=objective.alpha,
            divergence=objective.divergence,
            dtype=torch.bfloat16 if narrow else precision,
        )
        sums += found.sums
    else:
        gradient, sums, block = logits, found.sums.clone(), _block_rows(logits.device.type, len(head))
        for first in range(0, len(logits), block):
            part = slice(first, first + block)
            teacher_part = None if teacher_logits is None else teacher_logits[part]
            # Overwrites the logits with their gradient.
            sums += _differentiate(logits[part], answers[rows][part], teacher_part, objective)
    _exchange(gradient, objective.exchanged)
    if found.hidden is not None:
        found.hidden[rows] = products.times_head(gradient, head)
    if needs_head:
        first = rows.start == 0
        if first:
            # Chunks are added in float32, even if the head is narrower. A single chunk is summed in float32 by the
            # product itself, which then rounds it.
            dtype = gradient.dtype if rows.stop == len(hidden) else precision
            found.head = torch.empty_like(head, dtype=dtype)
        products.add_head_gradient(found.head, gradient, chunk, first)
    found.sums = sums


def _exchange(columns: Tensor, pair: tuple[int, int] | None) -> None:
    """Exchange two columns of [n, V_s] in place; none if `pair` is None."""
    if pair is not None:
        columns[:, list(pair)] = columns[:, list(reversed(pair))]


@cache
def _kernel(device: str) -> ModuleType | None:
    """Return the module of the Triton kernel where it runs, or None for PyTorch's operations; on CUDA, say which.

    It runs on NVIDIA's GPUs, and in Triton's interpreter, for tests, on the CPU.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (device != "cuda" or torch.version.cuda is None):
        return None
    try:
        from firstsight.loss import kernel  # imports Triton, which takes a second and may be missing

        # Triton needs a C compiler and Python's headers, and supports no old GPU: a single logit shows whether it runs.
        kernel.differentiate(
            torch.zeros(1, 1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            None,
            temperature=1.0,
            alpha=0.0,
            divergence=FORWARD_KL,
            dtype=torch.float32,
        )
    except Exception as error:
        if is_main_process():
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            log.warning("loss: by PyTorch's operations, because the Triton kernel does not run here (%s)", *reason)
        return None
    if is_main_process():
        log.info("loss: by the Triton kernel")
    return kernel


def _block_rows(device: str, vocabulary: int) -> int:
    """Return the number of answer tokens whose softmax is computed at once, on "cpu" or "cuda"."""
    return max(1, _BLOCK_BYTES[device] // (4 * vocabulary))


def _differentiate(logits: Tensor, answers: Tensor, teacher_logits: Tensor | None, objective: _Objective) -> Tensor:
    """Overwrite logits [n, V_s] with the gradient of L for them; return the sums [3] of D, CE and agreement."""
    shared, temperature, alpha = objective.shared, objective.temperature, objective.alpha
    divergence, agreement = logits.new_zeros(2)
    divergence_gradient = None
    if teacher_logits is not None:
        agreement = (logits[:, :shared].argmax(-1) == teacher_logits.argmax(-1)).sum()
        # The gradient of forward_kl is q - p. The other gradients are differences of larger terms, which float32 rounds
        # too much where p and q differ by a thousandth.
        precision = torch.float64 if objective.divergence.kind != "forward_kl" else logits.dtype
        log_p = log_softmax(teacher_logits.div_(temperature), dim=-1, dtype=precision)
        log_q = log_softmax(logits[:, :shared] / temperature, dim=-1, dtype=precision)
        compute = DIVERGENCES[objective.divergence.kind]
        divergence_gradient, divergence = compute(log_p, log_q, objective.divergence.beta)
    log_probabilities = log_softmax(logits, dim=-1)
    ce = -log_probabilities.gather(-1, answers[:, None]).sum()
    torch.exp(log_probabilities, out=logits).mul_(1 - alpha)
    logits.scatter_add_(-1, answers[:, None], logits.new_full((len(logits), 1), alpha - 1))
    if divergence_gradient is not None:
        # T^2 is in L; 1 / T is the derivative of z / T.
        logits[:, :shared].add_(divergence_gradient, alpha=alpha * temperature)
    return torch.stack([divergence.to(ce.dtype), ce, agreement.to(ce.dtype)])

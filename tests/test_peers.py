"""Where conventions coincide, our loss is TRL's and Liger-Kernel's.

They take logits of equal height, no shared part of them, and no T^2; so the vocabularies here are equal, and what they
compute at temperature T is put on our scale by T^2.
"""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from trl.experimental.gkd import GKDTrainer

from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import Divergence
from firstsight.loss.teachers import HiddenTeacher

TOKENS, VOCABULARY, BETAS = 93, 211, (0.1, 0.5, 0.9)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = normal(TOKENS, 24), normal(VOCABULARY, 24) * 0.6
    teacher_hidden, teacher_head = normal(TOKENS, 40), normal(VOCABULARY, 40) * 0.5
    answers = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), head.requires_grad_(), answers, teacher_hidden, teacher_head


def ours(tensors, temperature, alpha, divergence):
    hidden, head, answers, teacher_hidden, teacher_head = tensors
    return distillation_loss(
        hidden,
        head,
        answers,
        HiddenTeacher(teacher_hidden, teacher_head),
        shared_vocabulary=VOCABULARY,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
    )


def compare(tensors, mine, theirs, **tolerance):
    torch.testing.assert_close(mine, theirs, **tolerance)
    found, expected = (torch.autograd.grad(total, tensors[:2]) for total in (mine, theirs))
    torch.testing.assert_close(found, expected, **tolerance)


def divergence_of(beta: float) -> Divergence:
    """In their convention, beta = 0 is the forward and beta = 1 the reverse KL."""
    return {0: Divergence("forward_kl"), 1: Divergence("reverse_kl")}.get(beta) or Divergence("jsd", beta)


@pytest.mark.parametrize("beta", [0, *BETAS, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_trl_generalized_jsd(tensors, beta, temperature):
    hidden, head, answers, teacher_hidden, teacher_head = tensors
    theirs = GKDTrainer.generalized_jsd_loss(
        (hidden @ head.T)[None],
        (teacher_hidden @ teacher_head.T)[None],
        labels=answers[None],
        beta=beta,
        temperature=temperature,
    )
    mine = ours(tensors, temperature, 1.0, divergence_of(beta)).total / TOKENS
    compare(tensors, mine, theirs * temperature**2)


@pytest.mark.parametrize("beta", [0, *BETAS, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_liger_chunked_jsd_with_cross_entropy(tensors, beta, temperature):
    hidden, head, answers, teacher_hidden, teacher_head = tensors
    alpha = 0.7
    # Liger works in float32 at best.
    hidden, head = (one.detach().float().requires_grad_() for one in (hidden, head))
    tensors = hidden, head, answers, teacher_hidden.float(), teacher_head.float()
    loss = LigerFusedLinearJSDLoss(
        1 - alpha, alpha * temperature**2, beta=beta, temperature=temperature, compiled=False
    )
    theirs = loss(hidden, head, tensors[3], tensors[4], answers)
    mine = ours(tensors, temperature, alpha, divergence_of(beta)).total / TOKENS
    compare(tensors, mine, theirs, rtol=1e-4, atol=1e-6)

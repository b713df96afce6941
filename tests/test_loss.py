"""The loss against an oracle in float64, written from the definition and sharing none of its code."""

import numpy as np
import pytest
import torch

from firstsight.distillation.loss import CHUNK, Teacher, distillation_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def oracle(hidden, head, answers, teacher_hidden, teacher_head, shared, temperature, alpha):
    """Loss and its gradients for hidden states and head, from the definition, in float64."""
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    p = softmax(teacher_logits[:, :shared] / temperature)
    q = softmax(logits[:, :shared] / temperature)
    own = softmax(logits)
    rows = np.arange(len(answers))
    kl = (p * (np.log(p) - np.log(q))).sum()
    ce = -np.log(own[rows, answers]).sum()
    gradient = (1 - alpha) * own
    gradient[rows, answers] -= 1 - alpha
    gradient[:, :shared] += alpha * temperature * (q - p)
    return alpha * temperature**2 * kl + (1 - alpha) * ce, gradient @ head, gradient.T @ hidden


def case(tokens: int, student_rows: int, teacher_rows: int, seed: int = 0):
    """Random inputs whose logits spread as a language model's do (a standard deviation of about 3)."""
    rng = np.random.default_rng(seed)
    hidden, teacher_hidden = rng.normal(size=(tokens, 24)), rng.normal(size=(tokens, 40))
    head, teacher_head = rng.normal(size=(student_rows, 24)) * 0.6, rng.normal(size=(teacher_rows, 40)) * 0.5
    return hidden, head, rng.integers(student_rows, size=tokens), teacher_hidden, teacher_head


def ours(arrays, shared, temperature, alpha, dtype):
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in arrays)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    loss = distillation_loss(
        hidden,
        head,
        answers,
        Teacher(teacher_hidden.to(dtype), teacher_head.to(dtype)),
        shared_vocabulary=shared,
        temperature=temperature,
        alpha=alpha,
    )
    loss.total.backward()
    return loss.total.item(), hidden.grad.double().numpy(), head.grad.double().numpy()


@pytest.mark.parametrize("tokens", [1, 4, 167, CHUNK, 423, 1423])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (0.5, 0.3), (2.0, 0.7), (10.0, 1.0)])
def test_loss_and_gradients_equal_the_definition(tokens, temperature, alpha):
    arrays = case(tokens, student_rows=311, teacher_rows=337)
    expected = oracle(*arrays, 307, temperature, alpha)
    for dtype, loss_error, gradient_error in ((torch.float64, 1e-12, 1e-11), (torch.float32, 1e-6, 1e-5)):
        loss, hidden_grad, head_grad = ours(arrays, 307, temperature, alpha, dtype)
        assert loss == pytest.approx(expected[0], rel=loss_error)
        for found, wanted in ((hidden_grad, expected[1]), (head_grad, expected[2])):
            assert np.abs(found - wanted).max() <= gradient_error * np.abs(wanted).max()


def test_gradcheck():
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in case(5, 11, 13))
    teacher = Teacher(teacher_hidden, teacher_head)

    def total(hidden, head):
        return distillation_loss(hidden, head, answers, teacher, shared_vocabulary=9, temperature=1.7, alpha=0.6).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), head.requires_grad_()))


def test_identical_teacher_and_student_give_no_loss_and_no_gradient():
    hidden, head, answers, *_ = case(300, 101, 101)
    loss, hidden_grad, head_grad = ours((hidden, head, answers, hidden, head), 101, 3.0, 1.0, torch.float64)
    assert loss == pytest.approx(0, abs=1e-9)
    assert np.abs(hidden_grad).max() < 1e-12
    assert np.abs(head_grad).max() < 1e-12


def test_soft_gradient_keeps_its_size_at_high_temperature():
    """T^2 in the loss makes the gradient tend to a limit (z_s - z_t) / V as T grows, instead of to zero."""
    arrays = case(64, 101, 101)
    sizes = [np.linalg.norm(ours(arrays, 101, temperature, 1.0, torch.float64)[1]) for temperature in (50, 500, 5000)]
    assert sizes[2] == pytest.approx(sizes[1], rel=1e-2)
    assert sizes[2] > 0.1 * sizes[0]


def test_a_frozen_head_gets_no_gradient_and_autocast_changes_nothing():
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(a) for a in case(50, 31, 33))
    hidden = hidden.float().requires_grad_()
    arguments = (hidden, head.float(), answers, Teacher(teacher_hidden.float(), teacher_head.float()))
    keywords = {"shared_vocabulary": 29, "temperature": 2.0, "alpha": 0.5}
    plain = distillation_loss(*arguments, **keywords).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = distillation_loss(*arguments, **keywords).total
    assert torch.equal(plain, autocast)
    plain.backward()
    assert hidden.grad is not None


def test_sixteen_bit_inputs_are_computed_in_full_precision():
    """The loss of bfloat16 inputs is the exact loss of those inputs, not of bfloat16 logits."""
    arrays = [
        torch.from_numpy(a).bfloat16().double().numpy() if a.dtype.kind == "f" else a for a in case(200, 311, 337)
    ]
    expected = oracle(*arrays, 307, 2.0, 0.7)
    loss, hidden_grad, _ = ours(arrays, 307, 2.0, 0.7, torch.bfloat16)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    # Only the result is rounded to bfloat16: half a unit in the last of 8 bits.
    assert np.all(np.abs(hidden_grad - expected[1]) <= 2**-8 * np.abs(expected[1]) + 1e-6)


def test_alpha_without_a_teacher_is_refused():
    hidden, head, answers, *_ = (torch.from_numpy(array) for array in case(5, 11, 13))
    with pytest.raises(ValueError, match="no"):
        distillation_loss(hidden, head, answers, None, shared_vocabulary=0, temperature=1.0, alpha=0.5)

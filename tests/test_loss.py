"""The loss against an oracle in float64, written from the definition and sharing none of its code."""

import sys

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from firstsight.loss import distillation_loss as module
from firstsight.loss import products
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import Divergence
from firstsight.loss.products import CHUNK
from firstsight.loss.teachers import HiddenTeacher, TopKTeacher

DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.1),
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.9),
]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of each row, as (p (log(p / q) - 1) + q), whose terms are all positive: no cancellation."""
    return (p * np.log(p / q) - p + q).sum(-1)


def through_softmax(probabilities: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The softmax's Jacobian applied to a gradient for its probabilities."""
    return probabilities * (gradient - (probabilities * gradient).sum(-1, keepdims=True))


def oracle(arrays, shared, temperature, alpha, divergence):
    """Loss and its gradients for hidden states and head, from the definition, in float64."""
    loss, gradient = logits_oracle(arrays, shared, temperature, alpha, divergence)
    return loss, gradient @ arrays[1], gradient.T @ arrays[0]


def logits_oracle(arrays, shared, temperature, alpha, divergence):
    """Loss and its gradient for the student's logits, likewise."""
    hidden, head, answers, teacher_hidden, teacher_head = arrays
    logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    p = softmax(teacher_logits[:, :shared] / temperature)
    q = softmax(logits[:, :shared] / temperature)
    rows, beta = np.arange(len(answers)), divergence.beta
    m = beta * p + (1 - beta) * q
    if divergence.kind == "forward_kl":
        soft, for_q = kl(p, q).sum(), -p / q
    elif divergence.kind == "reverse_kl":
        soft, for_q = kl(q, p).sum(), np.log(q / p) + 1
    else:
        soft = (beta * kl(p, m) + (1 - beta) * kl(q, m)).sum()
        # By the product rule on both terms, m included.
        for_m = -beta * p / m - (1 - beta) * q / m
        for_q = (1 - beta) * (np.log(q / m) + 1) + for_m * (1 - beta)
    own = softmax(logits)
    ce = -np.log(own[rows, answers]).sum()
    gradient = (1 - alpha) * own
    gradient[rows, answers] -= 1 - alpha
    gradient[:, :shared] += alpha * temperature**2 * through_softmax(q, for_q) / temperature
    return alpha * temperature**2 * soft + (1 - alpha) * ce, gradient


def case(tokens: int, student_rows: int, teacher_rows: int, seed: int = 0):
    """Random inputs whose logits spread as a language model's do (a standard deviation of about 3)."""
    rng = np.random.default_rng(seed)
    hidden, teacher_hidden = rng.normal(size=(tokens, 24)), rng.normal(size=(tokens, 40))
    head, teacher_head = rng.normal(size=(student_rows, 24)) * 0.6, rng.normal(size=(teacher_rows, 40)) * 0.5
    return hidden, head, rng.integers(student_rows, size=tokens), teacher_hidden, teacher_head


def ours(arrays, shared, temperature, alpha, divergence, dtype, device="cpu"):
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array).to(device) for array in arrays)
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    loss = distillation_loss(
        hidden,
        head,
        answers,
        HiddenTeacher(teacher_hidden.to(dtype), teacher_head.to(dtype)),
        shared_vocabulary=shared,
        temperature=temperature,
        alpha=alpha,
        divergence=divergence,
    )
    loss.total.backward()
    return loss.total.item(), hidden.grad.double().cpu().numpy(), head.grad.double().cpu().numpy()


def check(arrays, shared, temperature, alpha, divergence):
    expected = oracle(arrays, shared, temperature, alpha, divergence)
    for dtype, loss_error, gradient_error in ((torch.float64, 1e-12, 1e-11), (torch.float32, 1e-6, 1e-5)):
        loss, hidden_grad, head_grad = ours(arrays, shared, temperature, alpha, divergence, dtype)
        assert loss == pytest.approx(expected[0], rel=loss_error)
        for found, wanted in ((hidden_grad, expected[1]), (head_grad, expected[2])):
            assert np.abs(found - wanted).max() <= gradient_error * np.abs(wanted).max()


@pytest.mark.parametrize("tokens", [1, 4, 167, CHUNK["cpu"], 423, 1423])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (0.5, 0.3), (2.0, 0.7), (10.0, 1.0)])
def test_loss_and_gradients_equal_the_definition(tokens, temperature, alpha):
    check(case(tokens, 311, 337), 307, temperature, alpha, Divergence("forward_kl"))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("alpha", [0.7, 1.0])
def test_every_divergence_equals_its_definition(divergence, temperature, alpha):
    check(case(300, 311, 337, seed=1), 307, temperature, alpha, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("temperature", [0.5, 10.0])
@pytest.mark.parametrize("spread", [1 / 3, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_few_tokens_have_no_rounding_to_average_out(divergence, temperature, spread, tokens):
    """Also where the divergence is small beside its terms: logits that are alike, at a high temperature."""
    arrays = case(tokens, 311, 337, seed=2)
    hidden, head, answers, teacher_hidden, teacher_head = arrays
    rounded = (one.astype(np.float32).astype(np.float64) for one in (hidden, head * spread))
    teacher = (one.astype(np.float32).astype(np.float64) for one in (teacher_hidden, teacher_head * spread))
    check((*rounded, answers, *teacher), 307, temperature, 1.0, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
def test_gradcheck(divergence):
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in case(5, 11, 13))
    teacher = HiddenTeacher(teacher_hidden, teacher_head)

    def total(hidden, head):
        return distillation_loss(
            hidden, head, answers, teacher, shared_vocabulary=9, temperature=1.7, alpha=0.6, divergence=divergence
        ).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), head.requires_grad_()))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
def test_identical_teacher_and_student_give_no_loss_and_no_gradient(divergence):
    hidden, head, answers, *_ = case(300, 101, 101)
    arrays = (hidden, head, answers, hidden, head)
    loss, hidden_grad, head_grad = ours(arrays, 101, 3.0, 1.0, divergence, torch.float64)
    assert loss == pytest.approx(0, abs=1e-9)
    assert np.abs(hidden_grad).max() < 1e-12
    assert np.abs(head_grad).max() < 1e-12


def test_soft_gradient_keeps_its_size_at_high_temperature():
    """T^2 in the loss makes the gradient tend to a limit (z_s - z_t) / V as T grows, instead of to zero."""
    arrays, kl = case(64, 101, 101), Divergence("forward_kl")
    sizes = [np.linalg.norm(ours(arrays, 101, t, 1.0, kl, torch.float64)[1]) for t in (50, 500, 5000)]
    assert sizes[2] == pytest.approx(sizes[1], rel=1e-2)
    assert sizes[2] > 0.1 * sizes[0]


def test_a_frozen_head_gets_no_gradient_and_autocast_changes_nothing():
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(a) for a in case(50, 31, 33))
    hidden = hidden.float().requires_grad_()
    arguments = (hidden, head.float(), answers, HiddenTeacher(teacher_hidden.float(), teacher_head.float()))
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
        torch.from_numpy(array).bfloat16().double().numpy() if array.dtype.kind == "f" else array
        for array in case(200, 311, 337)
    ]
    kl = Divergence("forward_kl")
    expected = oracle(arrays, 307, 2.0, 0.7, kl)
    loss, hidden_grad, _ = ours(arrays, 307, 2.0, 0.7, kl, torch.bfloat16)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    # Only the result is rounded to bfloat16: half a unit in the last of 8 bits.
    assert np.all(np.abs(hidden_grad - expected[1]) <= 2**-8 * np.abs(expected[1]) + 1e-6)


def top_k(k: int, shared: int, arrays) -> TopKTeacher:
    logits = torch.from_numpy(arrays[3] @ arrays[4].T)[:, :shared]
    best = logits.topk(k)
    return TopKTeacher(best.indices, best.values, logits.logsumexp(-1))


def test_top_k_is_exact_when_k_is_everything_and_nears_it_as_k_grows():
    arrays = case(200, 311, 337)
    hidden, head, answers = (torch.from_numpy(array) for array in arrays[:3])
    exact = oracle(arrays, 307, 2.0, 1.0, Divergence("forward_kl"))[0]
    keywords = {"shared_vocabulary": 307, "temperature": 2.0, "alpha": 1.0}
    errors = [
        abs(distillation_loss(hidden, head, answers, top_k(k, 307, arrays), **keywords).total.item() / exact - 1)
        for k in (8, 64, 256, 307)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_top_k_keeps_the_tails_probability():
    arrays = case(50, 311, 337)
    logits = top_k(16, 307, arrays).logits(slice(0, 50), 307, torch.float64)
    exact = torch.from_numpy(arrays[3] @ arrays[4].T)[:, :307]
    best = exact.topk(16).indices
    torch.testing.assert_close(logits.softmax(-1).gather(-1, best), exact.softmax(-1).gather(-1, best))


def test_no_token_of_top_ks_tail_is_likelier_than_the_k():
    """Of an even fall by 1 a token, then a far tail, whose probability is less than float32 can tell from none."""
    exact = torch.cat([-torch.arange(64.0), torch.full((936,), -80.0)])[None]
    best = exact.topk(64)
    known = TopKTeacher(best.indices, best.values, exact.logsumexp(-1))
    rebuilt = known.logits(slice(0, 1), 1000, torch.float32)
    assert rebuilt[:, 64:].max() <= rebuilt[:, :64].min()
    assert rebuilt[:, :64].equal(exact[:, :64])


@pytest.mark.parametrize("tokens", [1, 37])
def test_the_vocabularies_of_qwen2_vl(tokens):
    """Heads of 151,936 and 152,064 rows, of which 151,657 are tokens of both."""
    check(case(tokens, 151_936, 152_064), 151_657, 2.0, 0.7, Divergence("forward_kl"))


def test_no_answers_give_no_loss_and_gradients_of_zero():
    hidden, head, _, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in case(3, 31, 33))
    hidden, head = hidden[:0].requires_grad_(), head.requires_grad_()
    loss = distillation_loss(
        hidden,
        head,
        torch.zeros(0, dtype=torch.int64),
        HiddenTeacher(teacher_hidden[:0], teacher_head),
        shared_vocabulary=29,
        temperature=2.0,
        alpha=0.5,
    )
    loss.total.backward()
    assert loss.total.item() == 0
    assert hidden.grad.shape == hidden.shape
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_a_second_backward_pass_gives_the_same_gradients():
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in case(20, 31, 33))
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    keywords = {"shared_vocabulary": 29, "temperature": 2.0, "alpha": 0.5}
    total = distillation_loss(hidden, head, answers, HiddenTeacher(teacher_hidden, teacher_head), **keywords).total
    first = torch.autograd.grad(total * 3, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(total * 5, (hidden, head))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one / 3, other / 5)


def test_a_narrower_head_is_not_copied_whole_and_changes_nothing(monkeypatch):
    """The logits of bfloat16 heads are made a few rows of the head at a time, as from the same head in float32."""
    arrays = case(300, 311, 337)
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in arrays)
    head, teacher_head = head.bfloat16(), teacher_head.bfloat16()
    monkeypatch.setattr("firstsight.loss.products.HEAD_ROWS", 100)
    results = []
    for convert in (torch.Tensor.clone, torch.Tensor.float):
        own = hidden.float().requires_grad_()
        loss = distillation_loss(
            own,
            convert(head),
            answers,
            HiddenTeacher(teacher_hidden.float(), convert(teacher_head)),
            shared_vocabulary=307,
            temperature=2.0,
            alpha=0.7,
        )
        loss.total.backward()
        results.append((loss.total, own.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


def test_alpha_without_a_teacher_is_refused():
    hidden, head, answers, *_ = (torch.from_numpy(array) for array in case(5, 11, 13))
    with pytest.raises(ValueError, match=r"expected a teacher, because alpha is 0\.5, found None"):
        distillation_loss(hidden, head, answers, None, shared_vocabulary=0, temperature=1.0, alpha=0.5)


class SmallMemory(HiddenTeacher):
    """A teacher whose logits of more than 100 tokens do not fit into memory."""

    def logits(self, rows, shared, precision):
        if len(self.hidden[rows]) > 100:
            raise torch.OutOfMemoryError
        return super().logits(rows, shared, precision)


def test_memory_that_does_not_suffice_for_a_chunk_gives_smaller_ones(monkeypatch, caplog):
    monkeypatch.setitem(module._chunk, "cpu", 256)
    arrays = case(300, 311, 337)
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in arrays)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    keywords = {"shared_vocabulary": 307, "temperature": 2.0, "alpha": 0.7}
    expected = oracle(arrays, 307, 2.0, 0.7, Divergence("forward_kl"))
    for _ in range(2):
        total = distillation_loss(hidden, head, answers, SmallMemory(teacher_hidden, teacher_head), **keywords).total
        found = (total.detach(), *torch.autograd.grad(total, (hidden, head)))
        for one, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, wanted, rtol=1e-11, atol=1e-11)
    # Not again in the second pass.
    lines = [f"loss: memory does not suffice for more than {tokens} answer tokens at a time" for tokens in (128, 64)]
    assert caplog.messages == lines


def test_memory_that_does_not_suffice_for_a_token_is_an_error(monkeypatch):
    monkeypatch.setitem(module._chunk, "cpu", 256)
    hidden, head, answers, *_ = (torch.from_numpy(array) for array in case(5, 31, 33))

    class NoMemory:
        def logits(self, rows, shared, precision):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        distillation_loss(hidden, head, answers, NoMemory(), shared_vocabulary=29, temperature=2.0, alpha=0.5)


def test_where_triton_is_missing_pytorch_computes_and_a_line_says_so(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    # Another test may have imported it.
    monkeypatch.delitem(sys.modules, "firstsight.loss.kernel", raising=False)
    monkeypatch.delattr("firstsight.loss.kernel", raising=False)
    module._kernel.cache_clear()
    check(case(4, 31, 33), 29, 2.0, 0.7, Divergence("jsd"))
    assert caplog.messages == [
        "loss: by PyTorch's operations, because the Triton kernel does not run here (import of triton halted; None in "
        "sys.modules)"
    ]
    module._kernel.cache_clear()


def test_a_head_with_rows_of_zeros_up_to_whole_tiles_gives_the_same():
    hidden, head, answers, teacher_hidden, teacher_head = (torch.from_numpy(array) for array in case(20, 311, 307))
    filled = products.fill_tiles(teacher_head)
    assert filled.shape == (384, 40)
    assert products.fill_tiles(filled).shape == filled.shape
    keywords = {"shared_vocabulary": 307, "temperature": 2.0, "alpha": 0.7}
    totals = [
        distillation_loss(hidden, head, answers, HiddenTeacher(teacher_hidden, one), **keywords).total
        for one in (teacher_head, filled)
    ]
    torch.testing.assert_close(*totals)


def test_tf32_is_allowed_within_the_loss_alone():
    matmul = torch.backends.cuda.matmul
    for allowed in (True, False):
        with products.tf32(allowed):
            assert matmul.allow_tf32 == allowed
        assert not matmul.allow_tf32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_cuda_are_float32_over_whole_tiles(dtype):
    """Their shapes and dtypes, of tensors without contents, so that no GPU is needed."""
    with FakeTensorMode():
        hidden, head = (torch.empty(rows, 64, dtype=dtype, device="cuda") for rows in (9, 1100))
        logits = products.logits(hidden, head, 1003, torch.float32)
        assert (logits.shape, logits.stride(), logits.dtype) == ((9, 1003), (1024, 1), torch.float32)
        gradient = products.logits(hidden, head, 1100, torch.float32).to(dtype)
        assert products.times_head(gradient, head).dtype == torch.float32
        for total_dtype in (torch.float32, dtype):
            total = torch.empty(1100, 64, dtype=total_dtype, device="cuda")
            products.add_head_gradient(total, gradient, hidden, first=False)

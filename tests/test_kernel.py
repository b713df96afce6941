"""The loss's Triton kernel against the definition in float64, in Triton's interpreter on the CPU.

The interpreter is chosen when Triton is imported, so these computations run in a process of their own, which has
TRITON_INTERPRET=1 in its environment and takes the kernel for every loss. What the interpreter does not show (types,
registers, whether it is a GPU's code at all) is compiled here, without a GPU.
"""

import numpy as np
import pytest
import torch
import triton
from test_loss import DIVERGENCES, case, logits_oracle, oracle, ours, top_k
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_interpreter import interpreter

from firstsight.loss import distillation_loss as module
from firstsight.loss import kernel
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import Divergence
from firstsight.loss.teachers import HiddenTeacher

FORWARD_KL = Divergence("forward_kl")


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as call:
        assert call(takes_the_kernel)
        yield call


def takes_the_kernel() -> bool:
    return module._kernel("cpu") is not None


def test_the_cpu_takes_pytorchs_operations():
    assert not takes_the_kernel()


def check(interpreted, arrays, shared, temperature, alpha, divergence):
    """The tolerances of float32 in test_loss.py."""
    expected = oracle(arrays, shared, temperature, alpha, divergence)
    loss, *gradients = interpreted(ours, arrays, shared, temperature, alpha, divergence, torch.float32)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    for found, wanted in zip(gradients, expected[1:], strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize(("temperature", "alpha"), [(0.5, 0.7), (1.0, 1.0), (2.0, 0.0), (10.0, 1.0)])
def test_every_divergence_equals_its_definition(interpreted, divergence, temperature, alpha):
    check(interpreted, case(3, 311, 337, seed=1), 307, temperature, alpha, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("spread", [1 / 3, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_few_tokens_have_no_rounding_to_average_out(interpreted, divergence, spread, tokens):
    """Also where the divergence is small beside its terms: logits that are alike, at a high temperature."""
    hidden, head, answers, teacher_hidden, teacher_head = case(tokens, 311, 337, seed=2)
    rounded = (one.astype(np.float32).astype(np.float64) for one in (hidden, head * spread))
    teacher = (one.astype(np.float32).astype(np.float64) for one in (teacher_hidden, teacher_head * spread))
    check(interpreted, (*rounded, answers, *teacher), 307, 10.0, 1.0, divergence)


@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "shared"),
    [
        (2, 3, 1),
        (5, 6, 3),
        (1003, 999, 999),
        (kernel.BLOCK, kernel.BLOCK, kernel.BLOCK),
        (kernel.BLOCK + 1, kernel.BLOCK + 1, kernel.BLOCK + 1),
    ],
)
@pytest.mark.parametrize("divergence", [FORWARD_KL, Divergence("jsd", 0.5)], ids=lambda d: d.kind)
def test_vocabularies_of_any_size(interpreted, student_rows, teacher_rows, shared, divergence):
    check(interpreted, case(1, student_rows, teacher_rows), shared, 2.0, 0.7, divergence)


def test_the_vocabularies_of_qwen2_vl(interpreted):
    check(interpreted, case(1, 151_936, 152_064), 151_657, 2.0, 0.7, FORWARD_KL)


def in_chunks(tokens, *arguments):
    whole, module._chunk["cpu"] = module._chunk["cpu"], tokens
    try:
        return ours(*arguments)
    finally:
        module._chunk["cpu"] = whole


@pytest.mark.parametrize("divergence", [FORWARD_KL, Divergence("reverse_kl")], ids=lambda d: d.kind)
@pytest.mark.parametrize("chunk", [64, 5])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(interpreted, divergence, chunk, kind):
    """The loss is that of float32 logits; the gradient of a bfloat16 student's logits is rounded to bfloat16.

    The interpreter rounds towards zero: by up to a unit in the last of 8 bits, where a GPU is off by half of one.
    """
    arrays = [
        torch.from_numpy(array).to(kind).double().numpy() if array.dtype.kind == "f" else array
        for array in case(9, 311, 337)
    ]
    expected = oracle(arrays, 307, 2.0, 0.7, divergence)
    loss, *gradients = interpreted(in_chunks, chunk, arrays, 307, 2.0, 0.7, divergence, kind)
    assert loss == pytest.approx(expected[0], rel=1e-6)
    gradient = np.abs(logits_oracle(arrays, 307, 2.0, 0.7, divergence)[1])
    rounding = 2**-7 if kind == torch.bfloat16 else 1e-6
    sizes = gradient @ np.abs(arrays[1]), gradient.T @ np.abs(arrays[0])
    for found, wanted, size in zip(gradients, expected[1:], sizes, strict=True):
        assert np.all(np.abs(found - wanted) <= 2 * torch.finfo(kind).eps * np.abs(wanted) + rounding * size + 1e-6)
        # On average far less: errors of many columns cancel.
        assert np.linalg.norm(found - wanted) <= 2 * torch.finfo(kind).eps * np.linalg.norm(wanted)


def all_of(arrays, chunk, teacher, shared, alpha, dtype):
    """Every field of the loss, and the gradients of both inputs, twice."""
    module._chunk["cpu"] = chunk
    hidden, head, answers = (torch.from_numpy(array) for array in arrays[:3])
    hidden, head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    loss = distillation_loss(
        hidden, head, answers, teacher, shared_vocabulary=shared, temperature=2.0, alpha=alpha, divergence=FORWARD_KL
    )
    gradients = [torch.autograd.grad(loss.total, (hidden, head), retain_graph=True) for _ in range(2)]
    module._chunk["cpu"] = 256
    return [
        one.detach() for one in (loss.total, loss.divergence, loss.ce, loss.agreement, *gradients[0], *gradients[1])
    ]


@pytest.mark.parametrize(("teacher", "alpha"), [("hidden", 0.0), ("hidden", 0.7), ("top-k", 0.7), (None, 0.0)])
def test_sums_and_gradients_are_those_of_pytorchs_operations(interpreted, teacher, alpha):
    arrays = case(9, 311, 337)
    known = {
        "hidden": HiddenTeacher(torch.from_numpy(arrays[3]).float(), torch.from_numpy(arrays[4]).float()),
        "top-k": top_k(32, 307, arrays),
        None: None,
    }[teacher]
    shared = 307 if teacher else 0
    expected = all_of(arrays, 256, known, shared, alpha, torch.float64)
    assert expected[3] == 0 or teacher
    for chunk in (4, 256):
        found = interpreted(all_of, arrays, chunk, known, shared, alpha, torch.float32)
        torch.testing.assert_close(found, [one.float() for one in expected], rtol=1e-5, atol=1e-5)


def test_a_student_that_agrees_with_its_teacher(interpreted):
    hidden, head, answers, *_ = case(9, 311, 337)
    teacher = HiddenTeacher(torch.from_numpy(hidden).float(), torch.from_numpy(head).float())
    _, divergence, _, agreement, *_ = interpreted(
        all_of, (hidden, head, answers), 256, teacher, 311, 1.0, torch.float32
    )
    assert (divergence.item(), agreement.item()) == (0, 9)


def scaled(numbers, factor):
    gradient = torch.from_numpy(numbers).bfloat16()
    found = module._scaled(gradient, torch.tensor(factor))
    assert found is gradient
    return found


@pytest.mark.parametrize("count", [1, kernel._SCALED, kernel._SCALED + 3])
def test_a_gradient_in_sixteen_bits_is_scaled_by_a_factor_in_thirty_two(interpreted, count):
    numbers = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    found, factor = interpreted(scaled, numbers, 1 / 3), torch.tensor(1 / 3)
    expected = torch.from_numpy(numbers).bfloat16().float() * factor
    # The interpreter rounds towards zero.
    assert ((found.float() - expected).abs() <= 2**-7 * expected.abs()).all()


def test_no_answers_give_no_loss_and_gradients_of_zero(interpreted):
    arrays = [array[:0] if array.shape[0] == 3 else array for array in case(3, 31, 33)]
    loss, hidden_grad, head_grad = interpreted(ours, arrays, 29, 2.0, 0.5, FORWARD_KL, torch.float32)
    assert loss == 0
    assert hidden_grad.shape == (0, 24)
    assert not head_grad.any()


def test_a_logit_that_is_no_number_gives_a_loss_that_is_none(interpreted):
    arrays = case(3, 31, 33)
    arrays[0][1, 2] = np.nan
    loss, *_ = interpreted(ours, arrays, 29, 2.0, 0.5, FORWARD_KL, torch.float32)
    assert np.isnan(loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: f"{d.kind}-{d.beta}")
@pytest.mark.parametrize("tokens", [1, 52, 1300])
def test_on_a_gpu(divergence, tokens):
    assert module._kernel("cuda") is kernel
    arrays = [
        torch.from_numpy(array).bfloat16().double().numpy() if array.dtype.kind == "f" else array
        for array in case(tokens, 5003, 5100)
    ]
    expected = oracle(arrays, 4999, 2.0, 0.7, divergence)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        loss, *gradients = ours(arrays, 4999, 2.0, 0.7, divergence, dtype, "cuda")
        assert loss == pytest.approx(expected[0], rel=2e-6)
        for found, wanted in zip(gradients, expected[1:], strict=True):
            assert np.linalg.norm(found - wanted) <= error * np.linalg.norm(wanted)


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.parametrize("kind", ["none", "forward_kl", "reverse_kl", "jsd"])
def test_the_kernel_compiles_for_gpus(capability, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"logits": "*fp32", "gradient": "*bf16", "teacher": "*fp32", "answers": "*i64", "sums": "*fp32"}
    integers = dict.fromkeys(["logits_stride", "gradient_stride", "teacher_stride", "columns", "shared"], "i32")
    numbers = dict.fromkeys(["scale", "beta", "soft_weight", "hard_weight"], "fp32")
    signature = pointers | integers | numbers | {"kind": "constexpr", "block": "constexpr"}
    assert list(signature) == kernel._differentiate.arg_names
    constants = {"kind": kind, "block": kernel.BLOCK}
    if kind == "none":
        signature["teacher"], constants["teacher"] = "constexpr", None
    # All but `shared` are multiples of 16: pointers and strides, and the columns of Qwen2-VL.
    aligned = [*pointers, *list(integers)[:4]]
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name in aligned and signature[name] != "constexpr"
    }
    source = ASTSource(kernel._differentiate, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), kernel.OPTIONS)
    code = compiled.asm["ptx"].splitlines()
    loads = [line for line in code if "ld.global" in line]
    # But for the answer and its logit, rows are read 16 bytes at a time. The gradient is written after a barrier.
    assert len([line for line in loads if "ld.global.v4" not in line]) == 2
    last = max(number for number, line in enumerate(code) if "st.global.v" in line)
    before = [line for line in code[:last] if "ld.global" in line or "bar.sync" in line]
    assert "bar.sync" in before[-1]

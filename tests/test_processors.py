"""The same models on every processor, whatever faster paths libraries take on some."""

import json
import os
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from conftest import ROOT, make_sample
from families import SAVE
from torch import nn

from firstsight.models.loading import align_weights, load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import keep_weights_as_stored
from firstsight.packing.forward import last_hidden_states
from firstsight.packing.pack import collate, encode, pack

# Rows and columns: what the AVX-512-BF16 path takes (32 | rows, 64 | columns), and what it does not.
FITTING = [(32, 64), (96, 192)]
ODD = [(32, 32), (48, 64), (64, 96), (7, 130), (33, 31), (1, 64)]


@pytest.fixture(params=[False, True], ids=["without AVX-512-BF16", "with AVX-512-BF16"])
def avx512bf16(request, monkeypatch) -> bool:
    """What bitsandbytes believes of the processor."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: request.param)
    return request.param


def four_bit(rows: int, columns: int, bias: bool = True, double: bool = True) -> bnb.nn.Linear4bit:
    torch.manual_seed(rows)
    layer = bnb.nn.Linear4bit(columns, rows, bias, torch.float32, quant_type="nf4", compress_statistics=double)
    return layer.to("cpu").eval()


def copied(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("rows", "columns"), FITTING + ODD)
def test_a_layer_computes_from_its_weights_as_stored(avx512bf16, rows, columns, double):
    layer = four_bit(rows, columns, double=double)
    stored = copied(layer)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    keep_weights_as_stored(layer)
    x = torch.randn(5, columns)
    expected = nn.functional.linear(x, weight, layer.bias)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
    after = layer.state_dict()
    assert all(torch.equal(after[key], value) for key, value in stored.items())
    assert after.keys() == stored.keys()


@pytest.mark.parametrize(("rows", "columns"), [*FITTING, (32, 32)])
def test_training_after_an_evaluation_has_its_gradients(avx512bf16, rows, columns):
    layer = four_bit(rows, columns)
    keep_weights_as_stored(layer)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    with torch.no_grad():
        layer(torch.randn(3, columns))
    x = torch.randn(3, columns, requires_grad=True)
    layer.train()(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize(("rows", "columns"), ODD)
def test_the_library_still_fails_without_us(monkeypatch, rows, columns):
    """Where this no longer raises, bitsandbytes has mended its path: see `keep_weights_as_stored`."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    with pytest.raises((RuntimeError, AssertionError)), torch.inference_mode():
        four_bit(rows, columns)(torch.randn(5, columns))


@pytest.mark.parametrize(("rows", "columns"), FITTING)
def test_the_library_still_rounds_scales_without_us(rows, columns):
    layer = four_bit(rows, columns, double=False)
    stored = copied(layer)
    weight, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = weight, state
    assert not torch.equal(layer.state_dict()["weight.absmax"], stored["weight.absmax"])


@pytest.mark.parametrize("method", ["int8", "nf4", "int4"])
@pytest.mark.parametrize("name", SAVE)
def test_a_model_is_the_same_on_every_processor(monkeypatch, settings, processor, tmp_path, name, method):
    SAVE[name](tmp_path, settings, processor)
    reader, found = load_processor(tmp_path), []
    sample = make_sample("text", "none", 0, [("What is in your left hand?", "a red cup"), ("Why?", "because")])
    batch = collate([pack(reader, sample, encode(reader, sample, sample.records))], 0)
    for claimed in (False, True):
        monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda claimed=claimed: claimed)
        model = load_model(tmp_path, method, "cpu")
        with torch.inference_mode():
            found.append(last_hidden_states(model, batch))
        # After a forward pass, as much as before it.
        model.save_pretrained(tmp_path / str(claimed))
    assert torch.equal(*found)
    files = [(tmp_path / claimed / "model.safetensors").read_bytes() for claimed in ("False", "True")]
    assert files[0] == files[1]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(5, 32, 32), (1, 64, 7), (33, 31, 130), (3, 192, 48)])
def test_both_products_of_int8_are_exact(rows, inner, columns):
    """torch's own, which bitsandbytes takes with AVX-512, and the one it takes without."""
    generator = torch.Generator().manual_seed(rows)
    a = torch.randint(-127, 128, (rows, inner), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (columns, inner), generator=generator, dtype=torch.int8)
    expected = (a.long() @ b.long().T).int()
    assert torch.equal(torch._int_mm(a, b.T), expected)
    assert torch.equal(torch.ops.bitsandbytes.int8_linear_matmul(a, b), expected)


def test_loaded_weights_lie_where_products_round_alike(smoke):
    for method in ("auto", "int8", "nf4", "int4"):
        model = load_model(smoke / "models/student-distilled", method, "cpu")
        weights = [*model.parameters(), *model.buffers()]
        assert {p.data_ptr() % 64 for p in weights if p.is_floating_point()} == {0}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert head.weight is embedding.weight
    tensor = nn.Parameter(torch.arange(65.0)[1:])
    holder = nn.ParameterList([tensor])
    align_weights(holder)
    assert torch.equal(tensor, torch.arange(1.0, 65.0))


@pytest.mark.slow
@pytest.mark.system
def test_stages_say_and_write_the_same_where_the_processor_has_it(smoke, smoke_copy):
    """In processes that believe it from the start, as on such a processor: nothing about kernels that it lacks."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests/avx512bf16"), str(ROOT)])}
    for stage, argument in (("quantize_student", "nf4"), ("evaluate", "student-nf4"), ("evaluate", "student")):
        words = [sys.executable, "-m", f"stages.{stage}", argument]
        done = subprocess.run(words, cwd=smoke_copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "kernel" not in done.stdout + done.stderr
        assert ("nf4: 14 layers compute from their weights as stored" in done.stderr) == (argument != "student")
    for name in ("models/student-nf4/model.safetensors", "evaluations/student-nf4/predictions.json"):
        assert (smoke_copy / name).read_bytes() == (smoke / name).read_bytes()
    found = [json.loads((one / "models/student-nf4/quantization.json").read_text()) for one in (smoke, smoke_copy)]
    assert found[0] == found[1]

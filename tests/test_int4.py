"""Matrices in 4 bits: how they are rounded, stored and multiplied, and what a model with them is to other libraries.

The kernel runs in Triton's interpreter, in float32 and float16: the interpreter multiplies no bfloat16. For GPUs it is
compiled here, without one, in all that they multiply.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import triton
from alone import packed as packed_samples
from conftest import change, make_sample, run_stage
from families import SAVE
from test_models import CALIBRATION
from text_families import TEXT_SAVE
from torch import nn
from transformers import AutoModelForImageTextToText
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_interpreter import interpreter

from firstsight.core.errors import UserError
from firstsight.core.variants import LEFT_OUT
from firstsight.generation.answering import answers
from firstsight.models import int4, int4_kernel, rounding
from firstsight.models.footprint import parameters, token_bytes
from firstsight.models.int4 import Int4Linear
from firstsight.models.loading import int4_misfit, load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import check_quantized, stored_method
from firstsight.packing.forward import last_hidden_states
from firstsight.publishing.model_card import model_card
from firstsight.quantization import gptq
from firstsight.quantization.gptq import InputRounding
from firstsight.quantization.quantize import quantize_folder
from firstsight.records.sample import Text


@pytest.fixture(scope="module")
def interpreted():
    with interpreter() as call:
        yield call


def layer_and_inputs(rows, columns, group, shape, dtype, bias=True):
    generator = torch.Generator().manual_seed(rows + columns)
    layer = nn.Linear(columns, rows, bias=bias).to(dtype).requires_grad_(False)
    layer.weight.normal_(generator=generator)
    return Int4Linear.of(layer, group), torch.randn(*shape, columns, generator=generator).to(dtype)


def product(layer, inputs):
    return int4_kernel.multiply(inputs, layer.weight_packed, layer.weight_scale, layer.bias)


def exact(layer, inputs) -> torch.Tensor:
    """The definition, in float64."""
    levels = layer.weight_packed[..., None] >> torch.arange(0, 32, 4) & 15
    grouped = levels.flatten(1).double().view(*layer.weight_scale.shape, -1) - 8
    weights = (grouped * layer.weight_scale[..., None].double()).flatten(1)
    return inputs.double() @ weights.T + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "group", "shape"),
    [(80, 192, 64, (1, 1)), (33, 96, 32, (2, 5)), (7, 32, 16, (64,)), (200, 1024, 64, (3, 1)), (1, 64, 64, (0, 2))],
)
def test_the_kernel_multiplies_by_the_weights_that_levels_stand_for(interpreted, dtype, rows, columns, group, shape):
    layer, inputs = layer_and_inputs(rows, columns, group, shape, dtype, bias=rows != 7)
    expected = exact(layer, inputs)
    found = interpreted(product, layer, inputs)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    error = {torch.float32: 5e-7, torch.float16: 5e-4}[dtype]
    for one in (found, layer(inputs)):
        assert (one.double() - expected).norm() <= error * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_on_a_gpu(dtype, tokens):
    layer, inputs = layer_and_inputs(1536, 8960, 64, (tokens,), dtype)
    expected = exact(layer, inputs)
    found = product(layer.cuda(), inputs.cuda()).cpu()
    error = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[dtype]
    assert (found.double() - expected).norm() <= error * expected.norm()
    int4.take_kernel(nn.Sequential(layer))
    assert layer.kernel is int4_kernel.multiply


@pytest.mark.parametrize(("capability", "dtype"), [(75, "fp16"), (80, "bf16"), (90, "bf16"), (90, "fp32")])
def test_the_kernel_compiles_for_gpus(capability, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"inputs": f"*{dtype}", "packed": "*i32", "scale": f"*{dtype}", "sums": "*fp32"}
    signature |= dict.fromkeys(["count", "rows", "columns"], "i32")
    constants = {"tokens": 16, "rows_of": int4_kernel.ROWS, "group": 64, "groups_of": 4}
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == int4_kernel._multiply.arg_names
    # Pointers, and the rows and columns of Qwen2-VL, are multiples of 16.
    attributes = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 3, 5, 6)}
    source = ASTSource(int4_kernel._multiply, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), int4_kernel.OPTIONS)
    code = compiled.asm["ptx"]
    assert "st.local" not in code  # no number leaves the registers
    # On the tensor cores, which Triton does not use before sm_80.
    assert ("mma" in code) == (capability >= 80 and dtype != "fp32")


def test_levels_are_packed_as_compressed_tensors_does():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    levels = torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(int4.packed(levels), pack_to_int32(levels, 4))
    assert torch.equal(int4.unpacked(int4.packed(levels)).to(torch.int8) - 8, levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_weight_is_rounded_to_the_nearest_level(dtype):
    weights = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights[2] = 0
    weights[3, :64] = 1e-30  # no number of float16
    levels, scale = int4.rounded(weights, 64)
    assert (levels.min(), levels.max(), scale.dtype) == (-8, 7, dtype)
    choices = torch.arange(-8, 8) * scale.double()[..., None]
    grouped = weights.double().unflatten(1, (-1, 64))
    distances = (grouped[..., None] - choices[:, :, None]).abs()
    found = distances.gather(-1, levels.unflatten(1, (-1, 64))[..., None].long() + 8)[..., 0]
    assert torch.all(found <= distances.min(-1).values * 1.001 + 1e-9)


def test_the_kernel_is_taken_once_it_computes_what_it_should(monkeypatch):
    layer, inputs = layer_and_inputs(32, 64, 32, (3,), torch.float32)
    other, _ = layer_and_inputs(16, 32, 16, (1,), torch.float32)
    said, asked, wrong = [], [], {17: 0.1}
    monkeypatch.setattr(int4.log, "warning", lambda text, *values: said.append(text % values))

    def multiply(inputs, packed, scale, bias):
        tokens = inputs.numel() // inputs.shape[-1]
        asked.append(tokens)
        return nn.functional.linear(inputs, Int4Linear(packed, scale, None).weights(inputs.dtype), bias) + wrong.get(
            tokens, 0
        )

    monkeypatch.setattr(int4_kernel, "multiply", multiply)
    int4.take_kernel(nn.Sequential(layer))
    assert layer.kernel is None
    (line,) = said
    assert "its products of 17 tokens are off by" in line
    wrong.clear()
    int4.take_kernel(nn.Sequential(layer))
    assert (layer.kernel, said) == (multiply, [line])
    # A model of another shape, for which it fails, goes without; the first keeps it.
    wrong[1] = float("nan")
    int4.take_kernel(nn.Sequential(other))
    assert (layer.kernel, other.kernel) == (multiply, None)
    wrong.clear()
    asked.clear()
    with torch.inference_mode():
        for count in (1, 64, 65):
            layer(inputs[:1].expand(count, 64))
    layer(inputs)  # could be differentiated
    assert asked == [1, 64]


def test_transformers_loads_the_folder_to_the_same_model(smoke, settings, tmp_path):
    """By compressed-tensors, which vLLM takes too, and nothing of ours."""
    source = smoke / "models/student-distilled"
    measured = quantize_folder(source, tmp_path, "int4", settings.quantize, "cpu", CALIBRATION)
    whole, ours = load_model(source, "float32", "cpu"), load_model(tmp_path, "auto", "cpu")
    assert check_quantized(ours)["quantized_layers"] == measured["quantized_layers"] == 14
    assert (stored_method(tmp_path), parameters(ours)) == ("int4", whole.num_parameters())
    # Four bits, and a float32 scale for as many weights as the narrowest layer allows.
    layers = [one for one in ours.modules() if isinstance(one, Int4Linear)]
    weights = sum(one.in_features * one.out_features for one in layers)
    (group,) = {one.in_features // one.weight_scale.shape[1] for one in layers}
    stored = weights * (1 / 2 + 4 / group) + 16 * len(layers)
    assert measured["original_bytes"] - measured["bytes"] == 4 * weights - stored
    assert token_bytes(whole) - token_bytes(ours) == 4 * weights - stored
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        theirs = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        found, expected = theirs(input_ids=ids).logits, ours(input_ids=ids).logits
        assert 0 < (expected - whole(input_ids=ids).logits).norm() < 0.35 * expected.norm()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


READ = [
    make_sample("image", "image", 1, [("Colour?", "red"), ("Where is the cup?", "on the table")]),
    make_sample("video", "video", 4, [("What is in your left hand?", "a red cup")]),
    *(make_sample(f"text {number}", "none", 0, [(f"Is {number} more?", "yes, it is")]) for number in range(4)),
]


def test_layers_are_rounded_by_their_inputs_visual_and_text_tokens_alike(smoke):
    """Against the definition, for a layer whose inputs are easy to come by: those of the first block's attention."""
    source = smoke / "models/student-distilled"
    model, processor = load_model(source, "float32", "cpu"), load_processor(source)
    block, seen = model.model.language_model.layers[0], []
    hook = block.input_layernorm.register_forward_hook(lambda *call: seen.append(call[-1].detach()[0]))
    kinds = []
    for sample in READ:
        batch = packed_samples(processor, [sample])
        with torch.inference_mode():
            last_hidden_states(model, batch)
        kinds.append(batch["mm_token_type_ids"][0] > 0)
    hook.remove()
    inputs, visual = torch.cat(seen).double(), torch.cat(kinds)
    assert 20 < visual.sum() < len(visual) - 20
    both = [inputs[chosen] for chosen in (visual, ~visual)]
    moment = sum(one.T @ one / len(one) for one in both) / 2
    name = "model.language_model.layers.0.self_attn.v_proj"
    weights = block.self_attn.v_proj.weight.detach()
    group = int4.group_size(int4.rounded_layers(model, "model.language_model."))
    expected = rounding.gptq(weights.numpy().T, moment.numpy(), group)
    found = InputRounding(model, processor, READ).layers()
    stored, scales = found[name]
    levels = int4.unpacked(stored).to(torch.int8) - 8
    assert (levels != torch.from_numpy(expected[0].T)).float().mean() < 0.01  # moments in float32 are not exact
    torch.testing.assert_close(scales, torch.from_numpy(expected[1].T), rtol=0.05, atol=0)
    assert (levels != int4.rounded(weights, group)[0]).float().mean() > 0.1


def test_rounding_by_inputs_changes_what_layers_compute_less(smoke, settings, tmp_path, caplog):
    source, errors = smoke / "models/student-distilled", {}
    for name, samples in (("nearest", []), ("by inputs", READ)):
        (tmp_path / name).mkdir()
        measured = quantize_folder(
            source, tmp_path / name, "int4", settings.quantize, "cpu", [(one, one.records[0]) for one in READ], samples
        )
        errors[name] = measured["errors"]
        assert measured["rounded_by_inputs"] == (len(errors[name]) if samples else 0)
        assert check_quantized(load_model(tmp_path / name, "auto", "cpu"))["quantized_layers"] == 14
    mean = {name: sum(found.values()) / len(found) for name, found in errors.items()}
    assert mean["by inputs"] < 0.7 * mean["nearest"]
    assert "int4:" not in caplog.text


def test_layers_that_few_tokens_pass_are_rounded_to_the_nearest(smoke, settings, tmp_path, caplog):
    found = quantize_folder(
        smoke / "models/student-distilled", tmp_path, "int4", settings.quantize, "cpu", CALIBRATION, READ[2:3]
    )
    assert found["rounded_by_inputs"] == 0
    assert "int4: 14 of 14 layers are rounded to the nearest" in caplog.text
    assert "raise quantize.rounding_samples" in caplog.text


def test_moments_that_do_not_fit_together_are_counted_in_parts(smoke, monkeypatch):
    source = smoke / "models/student-distilled"
    model, processor = load_model(source, "float32", "cpu"), load_processor(source)
    whole = InputRounding(model, processor, READ).layers()
    monkeypatch.setattr(rounding, "MOST_BYTES", 3 * 8 * model.config.text_config.hidden_size**2)
    widths = {name: layer.in_features for name, layer in int4.rounded_layers(model, "model.language_model.").items()}
    assert len(list(rounding.parts(widths))) > 4
    in_parts = InputRounding(model, processor, READ).layers()
    assert whole.keys() == in_parts.keys() == widths.keys()
    assert all(
        torch.equal(one, other) for name in whole for one, other in zip(whole[name], in_parts[name], strict=True)
    )


@pytest.mark.parametrize("family", ["LlavaOnevisionForConditionalGeneration", "Qwen2ForCausalLM"])
def test_other_families_are_rounded_by_their_inputs(family, settings, processor, tmp_path, monkeypatch):
    SAVE[family](tmp_path, settings, processor)
    sees = family.startswith("Llava")
    counted = []
    balanced = gptq._Moments.balanced
    monkeypatch.setattr(gptq._Moments, "balanced", lambda self: counted.append(self.tokens) or balanced(self))
    model = load_model(tmp_path, "float32", "cpu")
    found = InputRounding(model, load_processor(tmp_path), READ if sees else READ[2:] * 4).layers()
    assert len(found) == 14
    assert len(counted) == 8  # queries, keys and values have one input, and so have the MLP's first two
    text, visual = counted[0]
    assert text > 0
    assert (visual > 0) == sees


def test_a_question_without_an_answer_is_read_with_the_models_own(smoke):
    source = smoke / "models/student-distilled"
    model, processor = load_model(source, "float32", "cpu"), load_processor(source)
    image, text = (
        make_sample("image", "image", 1, [("Colour?", "red"), ("How many?", "")]),
        Text("t", "", "A text of its own.", ("A text of its own.",), "text", max_tokens=9),
    )
    read = InputRounding(model, processor, [image, replace(READ[2], records=(text,))])._samples
    (own,) = answers(model, processor, [(image, image.records[1])], 1, 16)
    assert [[one.answer for one in sample.records] for sample in read] == [["red", own], ["A text of its own."]]
    assert own


def test_scales_are_those_that_are_stored(smoke):
    """In 16 bits they are rounded before the levels are chosen."""
    source = smoke / "models/student-distilled"
    model, processor = load_model(source, "bfloat16", "cpu"), load_processor(source)
    name = "model.language_model.layers.0.mlp.down_proj"
    seen = []
    layers = InputRounding(model, processor, READ)
    given = layers._moments

    def noted(part):
        found = given(part)
        seen.extend(moment for first, moment in found.items() if first == name)
        return found

    layers._moments = noted
    stored, scales = layers.layers()[name]
    assert scales.dtype == torch.bfloat16
    weights = model.get_submodule(name).weight.detach().float().numpy().T
    rounded = rounding.gptq(
        weights, seen[0], layers._group, lambda one: torch.from_numpy(one).bfloat16().float().numpy()
    )
    assert torch.equal(int4.unpacked(stored).to(torch.int8) - 8, torch.from_numpy(rounded[0].T))
    assert torch.equal(scales.float(), torch.from_numpy(rounded[1].T))


def test_a_folder_of_another_maker_is_not_taken_for_ours(smoke, settings, tmp_path):
    quantize_folder(smoke / "models/student-distilled", tmp_path, "int4", settings.quantize, "cpu", CALIBRATION)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert int4.is_int4(config)
    group = config["config_groups"]["group_0"]
    for other in (
        config | {"quant_method": "gptq"},
        config | {"format": "int-quantized"},
        config | {"config_groups": {"group_0": group | {"weights": group["weights"] | {"symmetric": False}}}},
        config | {"config_groups": {"group_0": group | {"weights": group["weights"] | {"actorder": "group"}}}},
        config | {"config_groups": {"a": group, "b": group}},
        {"quant_method": "compressed-tensors"},
        ["compressed-tensors"],
        *(config | {"ignore": names} for names in (["re:.*lm_head"], None, "lm_head", [1])),
    ):
        assert not int4.is_int4(other)


def test_a_model_without_linear_layers_or_of_odd_widths_is_refused(smoke, settings, processor, tmp_path):
    TEXT_SAVE["gpt2"](tmp_path, settings, processor)
    assert int4_misfit(tmp_path).endswith("with a multiple of 16 inputs, found gpt2 with none")
    with pytest.raises(UserError, match=r"int4: expected a language model of linear layers .* gpt2 with none; leave"):
        load_model(tmp_path, "int4", "cpu")
    shutil.copytree(smoke / "models/student", tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    config["text_config"]["intermediate_size"] = 40
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    assert int4_misfit(tmp_path / "odd").endswith("found qwen2_vl with 40 inputs")
    assert int4_misfit(smoke / "models/student") is None
    (tmp_path / "odd/config.json").write_text("{")
    with pytest.raises(UserError, match="expected a complete Hugging Face model folder"):
        int4_misfit(tmp_path / "odd")


@pytest.mark.system
def test_the_pipeline_makes_measures_and_describes_the_variant(smoke_copy, monkeypatch):
    change(smoke_copy, "quantize", methods=["int4"])
    change(smoke_copy, "evaluate", teacher_methods=["int4"])
    stages = [("check_inputs",), *(("quantize_student", method) for method in ("int4", "nf4"))]
    stages += [("evaluate", variant) for variant in ("student-int4", "student-nf4", "teacher-int4")]
    for stage in [*stages, ("report",)]:
        run_stage(smoke_copy, *stage)
    quality, performance, quantization = (
        json.loads((smoke_copy / f"metrics/{name}.json").read_text())
        for name in ("quality", "performance", "quantization")
    )
    assert quality.keys() >= {"student-int4", "teacher-int4"}
    assert list(quantization) == ["int4"]
    measured = json.loads((smoke_copy / "models/student-int4/quantization.json").read_text())
    assert measured["rounded_by_inputs"] == measured["quantized_layers"] == 14
    whole, found = performance["student-distilled"], performance["student-int4"]
    assert found["parameters"] == whole["parameters"]
    assert found["disk_bytes"] < whole["disk_bytes"]
    assert performance["teacher-int4"]["weights_bytes"] < performance["teacher"]["weights_bytes"]
    monkeypatch.chdir(smoke_copy)
    assert "accelerate compressed-tensors\n" in model_card("student-int4", "me/student")


@pytest.mark.system
def test_what_int4_does_not_round_is_left_out_of_students_and_refused_of_teachers(settings, processor, smoke_copy):
    folder = smoke_copy / "models/student-distilled"
    shutil.rmtree(folder)
    folder.mkdir()
    TEXT_SAVE["gpt2"](folder, settings, processor)
    change(smoke_copy, "quantize", methods=["int4"])
    run_stage(smoke_copy, "quantize_student", "int4")
    assert "gpt2 with none" in json.loads((smoke_copy / "models/student-int4" / LEFT_OUT).read_text())
    change(smoke_copy, "evaluate", teacher_methods=["int8", "int4"])
    teacher = smoke_copy / "models/teacher"
    config = json.loads((teacher / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"evaluate.teacher_methods: models/teacher: expected a language model of linear"
    ):
        run_stage(smoke_copy, "check_inputs")


def test_an_adapter_over_int4_is_one_line(smoke, settings, tmp_path):
    quantize_folder(smoke / "models/student-distilled", tmp_path, "int4", settings.quantize, "cpu", CALIBRATION)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"expected int4 weights without an adapter, found adapter/; take the model"):
        load_model(tmp_path, "auto", "cpu")

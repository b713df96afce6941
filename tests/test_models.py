"""Model folders: plain Hugging Face, loaded whole or refused, quantized where they should be."""

import json
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import ROOT, make_sample
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from firstsight.acquisition import hub_client
from firstsight.acquisition.initialise import initialise
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, whole_folder
from firstsight.core.params import Initialisation
from firstsight.distillation.vocabulary import shared_vocabulary, vocabulary_fingerprint
from firstsight.generation.answering import model_inputs
from firstsight.loss.vocabulary import SharedVocabulary
from firstsight.models.int4 import Int4Linear
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.models.quantized import check_quantized
from firstsight.quantization.quantize import quantize_folder


def test_saved_models_load_without_firstsight(smoke):
    for name in ("teacher", "student", "teacher-finetuned", "student-distilled", "student-nf4"):
        folder = smoke / "models" / name
        model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
        assert type(processor).__name__ == "Qwen2VLProcessor"
        assert processor.tokenizer.eos_token == "<|im_end|>"


def test_the_teacher_is_larger_and_has_more_rows_for_the_same_tokens(smoke):
    teacher, student = (load_model(smoke / "models" / name, "auto", "cpu") for name in ("teacher", "student"))
    assert teacher.num_parameters() > 3 * student.num_parameters()
    assert teacher.get_input_embeddings().num_embeddings > student.get_input_embeddings().num_embeddings
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    tokenizers = [load_processor(smoke / "models" / name).tokenizer for name in ("teacher", "student")]
    assert shared_vocabulary(*tokenizers) == SharedVocabulary(len(tokenizers[0]))


def test_the_chat_template_has_qwens_structure(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cup"},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|><|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cup<|im_end|>\n"
    )


def test_the_same_seed_makes_the_same_model(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(__file__.rsplit("/tests", 1)[0])
    init = settings.models.student.init
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        initialise(Initialisation(**init.model_dump() | {"seed": seed}), tmp_path / name)
    prints = [fingerprint_files([tmp_path / name / "model.safetensors"]) for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_too_few_rows_for_the_tokens_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(__file__.rsplit("/tests", 1)[0])
    init = Initialisation(**settings.models.student.init.model_dump() | {"embedding_rows": 300})
    with pytest.raises(UserError, match=r"init\.embedding_rows: expected at least \d+, a row for every token"):
        initialise(init, tmp_path)


@pytest.mark.parametrize("load", [load_processor, lambda folder: load_model(folder, "auto", "cpu")])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(load, tmp_path):
    with pytest.raises(UserError, match=r"models/student: expected a complete .*, found no folder; make it again"):
        load(tmp_path / "models/student")


def damage_truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def damage_missing_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def damage_no_config(folder):
    (folder / "config.json").unlink()


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_other_sizes(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage", [damage_truncated, damage_missing_weight, damage_no_config, damage_config, damage_other_sizes]
)
def test_a_broken_model_folder_is_named(smoke_copy, damage):
    folder = smoke_copy / "models/student"
    damage(folder)
    with pytest.raises(UserError, match="models/student: expected a complete Hugging Face model folder") as error:
        load_model(folder, "auto", "cpu")
    assert "\n" not in str(error.value)


def test_a_local_folder_is_copied_and_a_broken_one_refused(smoke_copy, tmp_path):
    (tmp_path / "copied").mkdir()
    hub_client.copy(smoke_copy / "models/student", tmp_path / "copied")
    weights = tmp_path / "copied/model.safetensors"
    mine = smoke_copy / "models/student/model.safetensors"
    assert fingerprint_files([weights]) == fingerprint_files([mine])
    assert not weights.samefile(mine)  # DVC makes it read-only, and shares it with its cache
    assert load_model(tmp_path / "copied", "auto", "cpu")
    weights.unlink()
    damage_truncated(smoke_copy / "models/student")
    with pytest.raises(UserError, match=r"model\.safetensors: expected safetensors, found a broken file"):
        hub_client.copy(smoke_copy / "models/student", tmp_path / "copied")


CALIBRATION = [(sample, sample.records[0]) for sample in [make_sample("image", "image", 1, [("Colour?", "red")])]]


@pytest.mark.parametrize(("method", "kind"), [("int8", Linear8bitLt), ("nf4", Linear4bit), ("int4", Int4Linear)])
def test_quantized_folders_answer_like_the_original(smoke, settings, tmp_path, method, kind):
    source = smoke / "models/student-distilled"
    found = quantize_folder(source, tmp_path, method, settings.quantize, "cpu", CALIBRATION)
    original, quantized = load_model(source, "auto", "cpu"), load_model(tmp_path, "auto", "cpu")
    layers = {name: module for name, module in quantized.named_modules() if isinstance(module, nn.Linear)}
    inside = [name for name, module in layers.items() if isinstance(module, kind)]
    assert len(inside) == found["quantized_layers"] == 7 * original.config.text_config.num_hidden_layers
    assert found["kept_layers"] == len(layers) - len(inside)
    assert all(name.startswith("model.language_model.layers") for name in inside)
    assert found["original_bytes"] == original.get_memory_footprint()
    # 8 bits and a float32 scale a row; or 4 bits, an 8-bit scale for 64 weights, and code books of 16 and 256 floats;
    # or 4 bits, a float32 scale for 32 weights or 64, and the shape.
    rows = sum(layers[name].out_features for name in inside)
    weights = sum(layers[name].out_features * layers[name].in_features for name in inside)
    now = {"int8": weights + 4 * rows, "nf4": weights * (1 / 2 + 1 / 64) + len(inside) * 4 * (16 + 256)}
    scales = sum(getattr(layers[name], "weight_scale", torch.zeros(0)).numel() for name in inside)
    now |= {"int4": weights / 2 + 4 * scales + 16 * len(inside)}
    assert found["original_bytes"] - found["bytes"] == pytest.approx(4 * weights - now[method], rel=0.01)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        exact, approximate = original(input_ids=ids).logits, quantized(input_ids=ids).logits
    error = (approximate - exact).norm() / exact.norm()
    assert 0 < error < {"int8": 0.03, "nf4": 0.35, "int4": 0.35}[method]


def test_a_quantized_folder_is_loaded_as_it_is_and_not_by_another_method(smoke):
    folder = smoke / "models/student-nf4"
    for precision in ("auto", "nf4"):
        assert check_quantized(load_model(folder, precision, "cpu"))["quantized_layers"]
    for precision in ("int8", "float32", "bfloat16"):
        with pytest.raises(
            UserError, match=rf"weights that can be loaded as {precision}, found .* to nf4; set the .*auto"
        ):
            load_model(folder, precision, "cpu")


@pytest.mark.system
def test_loading_says_nothing(smoke):
    """No bars, and no tables of layers, from the libraries."""
    lines = [
        "from pathlib import Path",
        "from firstsight.acquisition import checks",
        "from firstsight.models.loading import load_model",
        f"folder = Path({str(smoke / 'models/student')!r})",
        "checks.check_weights(folder, 'it')",
        "[load_model(folder, precision, 'cpu') for precision in ('auto', 'int8', 'nf4', 'int4')]",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    said = (done.stdout + done.stderr).splitlines()
    assert [line for line in said if not line.startswith("nf4: ")] == []  # ours, on some processors


def test_the_error_of_a_layer_is_that_of_its_weights_on_its_own_inputs(smoke, settings, tmp_path):
    """Against the definition, for a layer whose inputs are easy to come by: those of the first block's attention."""
    source = smoke / "models/student-distilled"
    errors = quantize_folder(source, tmp_path, "nf4", settings.quantize, "cpu", CALIBRATION)["errors"]
    model, processor = load_model(source, "float32", "cpu"), load_processor(source)
    name, block = "model.language_model.layers.0.self_attn.v_proj", model.model.language_model.layers[0]
    weight = load_model(tmp_path, "auto", "cpu").get_submodule(name).weight
    dequantized = dequantize_4bit(weight.data, weight.quant_state).float()
    with torch.inference_mode():
        seen = model(**model_inputs(processor, CALIBRATION, "cpu"), output_hidden_states=True).hidden_states[0]
        inputs = block.input_layernorm(seen)
        lost = inputs @ (dequantized - block.self_attn.v_proj.weight).T
        expected = lost.norm() / block.self_attn.v_proj(inputs).norm()
    assert errors[name] == pytest.approx(float(expected), rel=0.02)
    assert len(errors) == 7 * len(model.model.language_model.layers)
    eight_bit = quantize_folder(source, tmp_path / "int8", "int8", settings.quantize, "cpu", CALIBRATION)["errors"]
    assert all(eight_bit[layer] < errors[layer] / 3 for layer in errors)


def test_how_nf4_is_made_is_a_parameter(smoke, settings, tmp_path):
    plain = settings.quantize.model_copy(update={"double_quantization": False, "compute_dtype": "bfloat16"})
    source = smoke / "models/student-distilled"
    quantize_folder(source, tmp_path, "nf4", plain, "cpu", CALIBRATION)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_use_double_quant"], config["bnb_4bit_compute_dtype"]) == (False, "bfloat16")
    quantize_folder(source, tmp_path / "doubly", "nf4", settings.quantize, "cpu", CALIBRATION)
    scales = [set(load_file(folder / "model.safetensors")) for folder in (tmp_path, tmp_path / "doubly")]
    assert [any("nested_absmax" in name for name in names) for names in scales] == [False, True]


def test_a_quantized_vision_tower_is_caught(smoke):
    model = load_model(smoke / "models/student-distilled", "int8", "cpu")
    check_quantized(model)
    block = model.model.visual.blocks[0].mlp
    block.fc1 = Linear8bitLt(block.fc1.in_features, block.fc1.out_features)
    with pytest.raises(RuntimeError, match=r"visual.blocks.0.mlp.fc1.* outside it"):
        check_quantized(model)


def test_another_vocabulary_names_the_first_token_that_differs(processor, settings, tmp_path):
    folder = tmp_path / "other"
    processor.tokenizer.save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = (token for token, index in vocabulary.items() if index in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UserError, match=r"models\.student: expected the teacher's vocabulary, where token 300 is"):
        shared_vocabulary(processor.tokenizer, other)
    assert vocabulary_fingerprint(other, 300) == vocabulary_fingerprint(processor.tokenizer, 300)
    assert vocabulary_fingerprint(other, 302) != vocabulary_fingerprint(processor.tokenizer, 302)


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with whole_folder(target) as folder:
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError), whole_folder(target) as folder:
        (folder / "b").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    with whole_folder(target) as folder:
        (folder / "c").write_text("second")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [target]

"""Language models of several families, in the hub's layout: GPT-2, Qwen2.5 (Instruct and base), DeepSeek's."""

import json

import pytest
import torch
from conftest import make_sample
from safetensors.torch import load_file
from text_families import DEEPSEEK_TOKENS, TEXT_SAVE

from firstsight.acquisition.checks import check_weights, facts
from firstsight.core.errors import UserError
from firstsight.core.variants import METHODS
from firstsight.generation.answering import answers, generate, model_inputs
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing.forward import last_hidden_states
from firstsight.packing.pack import IGNORE, collate, encode, pack
from firstsight.quantization.quantize import quantize_folder
from firstsight.training.adapters import TrainableModel

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things are there?", "two"), ("Why?", "because")]
SAMPLES = [make_sample(str(number), "none", 0, QUESTIONS[: number + 1]) for number in range(3)]
END = {"gpt2": "<|endoftext|>", "qwen2-base": "<|endoftext|>", "qwen2-instruct": "<|im_end|>"}
END["deepseek"] = DEEPSEEK_TOKENS[0]


@pytest.fixture(scope="module", params=TEXT_SAVE)
def family(request, language_models):
    return request.param, language_models[request.param]


@pytest.fixture(scope="module")
def loaded(family):
    _, folder = family
    return load_model(folder, "float32", "cpu"), load_processor(folder)


def test_a_checkpoint_as_on_the_hub_is_complete(family):
    name, folder = family
    check_weights(folder, name)


@torch.inference_mode()
def test_packed_answers_are_predicted_as_after_the_question_alone(family, loaded):
    name, _ = family
    model, processor = loaded
    batch = collate([pack(processor, one, encode(processor, one, one.records)) for one in SAMPLES], 0)
    hidden = last_hidden_states(model, batch)
    for row, sample in enumerate(SAMPLES):
        for number, record in enumerate(sample.records, start=1):
            chosen = (batch["labels"][row, 1:] != IGNORE) & (batch["segment_ids"][row, 1:] == number)
            tokens = batch["labels"][row, 1:][chosen]
            assert processor.tokenizer.decode(tokens) == record.answer + END[name]
            prompt = model_inputs(processor, [(sample, record)], "cpu")["input_ids"]
            alone = model.base_model(torch.cat([prompt, tokens[None]], 1)).last_hidden_state[
                0, prompt.shape[1] - 1 : -1
            ]
            torch.testing.assert_close(hidden[row, :-1][chosen], alone, atol=2e-5, rtol=1e-4)


PROMPTS = {
    "gpt2": "Why?\n",
    "qwen2-instruct": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "qwen2-base": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜><think>\n",
}


def test_a_question_is_asked_in_the_models_own_template_with_one_begin_token(family, loaded):
    name, _ = family
    _, processor = loaded
    sample = SAMPLES[2]
    asked = (sample, sample.records[2])
    inputs = model_inputs(processor, [asked], "cpu")
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == PROMPTS[name]
    packed = pack(processor, sample, encode(processor, sample, [asked[1]]))
    answer = "because" + END[name]
    assert processor.tokenizer.decode(packed["input_ids"]) == PROMPTS[name] + answer


def test_answers_in_batches_are_those_given_alone(loaded):
    model, processor = loaded
    questions = [(sample, record) for sample in SAMPLES for record in sample.records]
    together = list(answers(model, processor, questions, 4, 6))
    assert together == [one for question in questions for one in answers(model, processor, [question], 1, 6)]
    assert generate(model, model_inputs(processor, questions[:2], "cpu"), max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_language_model_is_quantized_except_its_head(family, settings, tmp_path, method):
    name, folder = family
    if (name, method) == ("gpt2", "int4"):
        pytest.skip("its layers are not nn.Linear; tests/test_int4.py")
    measured = quantize_folder(
        folder, tmp_path, method, settings.quantize, "cpu", [(SAMPLES[0], SAMPLES[0].records[0])]
    )
    assert measured["kept_layers"] == 1
    assert max(measured["errors"].values()) < {"int8": 0.05, "nf4": 0.2, "int4": 0.2}[method]
    again = load_model(tmp_path, "auto", "cpu")
    assert list(answers(again, load_processor(tmp_path), [(SAMPLES[0], SAMPLES[0].records[0])], 1, 3))


@pytest.mark.parametrize("method", ["lora", "adalora", "qlora"])
@torch.inference_mode()
def test_adapters_of_all_linear_layers_are_merged_into_what_was_trained(family, settings, tmp_path, method):
    _, folder = family
    adapter = settings.train.adapter.model_copy(update={"rank": 4, "target_modules": None})
    tuned = settings.train.model_copy(update={"method": method, "adapter": adapter})
    trainable = TrainableModel(folder, tuned, "cpu", 10)
    names = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in trainable.model.named_parameters() if "lora_" in name
    }
    gpt2 = {"c_attn", "c_proj", "c_fc"}
    assert names in (gpt2, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    for name, parameter in trainable.model.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
    processor = load_processor(folder)
    batch = collate([pack(processor, one, encode(processor, one, one.records)) for one in SAMPLES], 0)
    trained = last_hidden_states(trainable.model.eval(), batch)
    trainable.save_merged(tmp_path)
    processor.save_pretrained(tmp_path)
    merged = last_hidden_states(load_model(tmp_path, "float32", "cpu"), batch)
    torch.testing.assert_close(merged, trained, atol=1e-3, rtol=1e-3)
    before = last_hidden_states(load_model(folder, "float32", "cpu"), batch)
    assert (trained - before).norm() > 0.05 * before.norm()


def test_a_model_without_a_template_takes_its_plain_one_along(language_models, tmp_path):
    processor = load_processor(language_models["gpt2"])
    assert processor.tokenizer.pad_token == "<|endoftext|>"
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((language_models["gpt2"] / "config.json").read_text())
    again = load_processor(tmp_path)
    turns = [{"role": role, "content": [{"type": "text", "text": role}]} for role in ("user", "assistant")]
    assert again.apply_chat_template(turns, tokenize=False) == "user\nassistant<|endoftext|>"
    assert again.positions == 96


def test_a_plain_template_begins_as_the_tokenizer_does(language_models, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((language_models["deepseek"] / name).read_text())
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    rendered = load_processor(tmp_path).apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], tokenize=False
    )
    assert rendered == DEEPSEEK_TOKENS[3] + "Why?\n"


def test_a_model_that_stops_at_another_token_than_its_tokenizers_is_refused(language_models, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text((language_models["qwen2-instruct"] / name).read_text())
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": "<|endoftext|>"}))
    found = r"a chat template that ends a turn as generation_config.json says, and not with the eos_token '<\|endoft"
    with pytest.raises(UserError, match=found):
        load_processor(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": None}))
    with pytest.raises(UserError, match="found a tokenizer without an eos_token"):
        load_processor(tmp_path)


def test_masks_stored_with_weights_are_no_parameters(language_models):
    assert any(name.endswith(".attn.bias") for name in load_file(language_models["gpt2"] / "model.safetensors"))
    assert (
        facts(language_models["gpt2"])["parameters"]
        == load_model(language_models["gpt2"], "float32", "cpu").num_parameters()
    )

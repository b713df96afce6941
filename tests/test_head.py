"""The output head as one weight, whatever wraps it, or a refusal in words."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from firstsight.acquisition.initialise import build_model
from firstsight.core.errors import UserError
from firstsight.packing.output_head import head_weight


@pytest.fixture
def fresh(settings, processor):
    return build_model(settings.models.teacher.init, processor.tokenizer)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lm_head"], "r": 4, "lora_alpha": 12, "init_lora_weights": False} | changes)


def test_a_plain_head_is_its_weight(fresh):
    assert head_weight(fresh) is fresh.lm_head.weight


@pytest.mark.parametrize("config", [lora(), lora(use_rslora=True)], ids=["lora", "rslora"])
def test_a_lora_head_is_what_it_computes_and_its_adapter_learns(fresh, config):
    model = get_peft_model(fresh, config)
    hidden = torch.randn(7, 64)
    weight = head_weight(model)
    torch.testing.assert_close(hidden @ weight.T, model.get_output_embeddings()(hidden))
    weight.sum().backward()
    adapter = model.get_output_embeddings()
    assert adapter.lora_A["default"].weight.grad.any()
    assert adapter.lora_B["default"].weight.grad.any()
    with model.disable_adapter():
        assert head_weight(model) is adapter.base_layer.weight


def test_a_head_that_is_trained_whole_beside_adapters_is_its_copy(fresh):
    model = get_peft_model(fresh, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    weight = head_weight(model)
    assert weight.requires_grad
    assert weight is model.get_output_embeddings().modules_to_save["default"].weight


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda model: get_peft_model(model, lora(lora_dropout=0.1)), "LoRA with dropout"),
        (lambda model: get_peft_model(model, lora(use_dora=True)), "variant such as DoRA"),
        (lambda model: model.set_output_embeddings(nn.Linear(64, 704)) or model, "one with a bias"),
        (lambda model: model.set_output_embeddings(bnb.nn.Linear8bitLt(64, 704, bias=False)) or model, "Linear8bitLt"),
        (lambda model: model.set_output_embeddings(bnb.nn.Linear4bit(64, 704, bias=False)) or model, "Linear4bit"),
    ],
)
def test_other_heads_are_refused(fresh, wrap, found):
    with pytest.raises(UserError, match=f"expected an output head that is a plain linear layer.*found .*{found}"):
        head_weight(wrap(fresh))

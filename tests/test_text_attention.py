"""Masks of the last tokens alone give the states and gradients that masks of all tokens give."""

import pytest
import torch
from alone import packed
from conftest import make_sample
from egogpt_checkpoint import save_original
from families import SAVE
from peft import LoraConfig, get_peft_model
from text_families import save_gpt2
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from firstsight.acquisition.egogpt_conversion import convert
from firstsight.generation.answering import answers
from firstsight.models import text_attention
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.packing import forward
from firstsight.packing.forward import attention_mask, last_hidden_states
from firstsight.packing.pack import PADDING, PREFIX

QUESTIONS = [("What is in your left hand?", "a red cup"), ("How many things?", "two"), ("Why?", "because")]


def save_egogpt(folder, *_) -> None:
    save_original(folder / "original", "grid")
    convert(folder / "original", folder)


FAMILIES = SAVE | {"GPT2LMHeadModel": save_gpt2, "EgoGPT": save_egogpt}
TILE, NEVER = 4, 1 << 30


@pytest.fixture(params=FAMILIES)
def loaded(request, settings, processor, tmp_path):
    FAMILIES[request.param](tmp_path, settings, processor)
    return load_model(tmp_path, "float32", "cpu").double(), load_processor(tmp_path)


@pytest.fixture
def calls(monkeypatch):
    """The shapes of queries, keys and masks of each call of transformers' attention."""
    found = []

    def counted(module, query, key, value, mask, **options):
        found.append((query.shape[2], key.shape[2], None if mask is None else mask.shape[2]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setattr(text_attention, "sdpa_attention_forward", counted)
    return found


def samples(model, questions: int):
    """A sample of each kind that the model reads, of different lengths, with so many questions."""
    kinds = {"none": 0} | ({"image": 1, "video": 4} if hasattr(model.config, "vision_config") else {})
    asked = [make_sample(kind, kind, frames, QUESTIONS[:questions]) for kind, frames in kinds.items()]
    return [*asked, make_sample("longer", "none", 0, [("Where is it? " * 2, "here " * 3), *QUESTIONS[1:questions]])]


def states_and_gradients(model, batch):
    model.zero_grad()
    states = last_hidden_states(model, batch)[batch["segment_ids"] != PADDING]
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0), dtype=states.dtype)
    (states * noise).sum().backward()
    return [states.detach(), *(one.grad.clone() for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize("questions", [1, 3])
def test_states_and_gradients_are_those_of_a_mask_of_all_tokens(loaded, calls, monkeypatch, questions):
    model, processor = loaded
    batch = packed(processor, samples(model, questions))
    length = batch["input_ids"].shape[1]
    monkeypatch.setattr(forward, "_TILE", NEVER)
    expected = states_and_gradients(model, batch)
    assert set(calls) == {(length, length, length)}
    calls.clear()
    monkeypatch.setattr(forward, "_TILE", TILE)
    found = states_and_gradients(model, batch)
    if questions == 1:  # nothing but causal
        assert set(calls) == {(length, length, None)}
    else:
        segments = batch["segment_ids"]
        first = int((segments > 1).any(0).nonzero()[0])
        causal = first - first % TILE
        assert 0 < causal < length
        assert set(calls) == {(causal, causal, None), (length - causal, length, length - causal)}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_with_adapters_and_checkpointing_too(settings, processor, tmp_path, monkeypatch):
    SAVE["Qwen2VLForConditionalGeneration"](tmp_path, settings, processor)
    model, found = load_model(tmp_path, "float32", "cpu").double().train(), []
    batch = packed(processor, samples(model, 3))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = model.get_base_model().double()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for tile in (NEVER, TILE):
        monkeypatch.setattr(forward, "_TILE", tile)
        found.append(states_and_gradients(model, batch))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


def test_answers_are_the_same(loaded, calls, monkeypatch):
    """Questions about a sample are read as one sequence, whose keys and values are kept for the answers."""
    model, processor = loaded
    questions = [(sample, record) for sample in samples(model, 3) for record in sample.records]
    monkeypatch.setattr(forward, "_TILE", NEVER)
    expected = list(answers(model, processor, questions, len(questions), 6))
    calls.clear()
    monkeypatch.setattr(forward, "_TILE", TILE)
    assert list(answers(model, processor, questions, len(questions), 6)) == expected
    assert any(queries == keys and mask is None for queries, keys, mask in calls)


def test_a_record_does_not_see_the_one_before_it(settings, processor, tmp_path, monkeypatch):
    """The mask's boundary is that of the first row to reach its second record, and is rounded down."""
    SAVE["Qwen2VLForConditionalGeneration"](tmp_path, settings, processor)
    model = load_model(tmp_path, "float32", "cpu")
    monkeypatch.setattr(forward, "_TILE", TILE)
    rows = [
        [PREFIX] * 6 + [1] * 5 + [2] * 3 + [3] * 2,
        [PREFIX] * 3 + [1] * 4 + [2] * 2 + [PADDING] * 7,
        [PREFIX] * 2 + [1] * 2 + [PADDING] * 12,
    ]
    segments = torch.tensor(rows)
    assert attention_mask(model, segments).shape == (3, 1, 12, 16)
    assert attention_mask(model, segments[[0, 2]]).shape == (2, 1, 8, 16)
    assert attention_mask(model, segments[2:]).shape == (1, 1, 0, 16)
    whole = torch.tensor([[0, 1, 2, 1]])
    assert attention_mask(model, whole[:, :3]).shape == (1, 1, 3, 3)  # shorter than a tile
    model.config.text_config._attn_implementation = "sdpa"
    full = attention_mask(model, segments)
    assert full.shape == (3, 1, 16, 16)
    model.config.text_config._attn_implementation = text_attention.NAME
    assert torch.equal(attention_mask(model, segments), full[:, :, 4:])


def test_other_architectures_keep_masks_of_all_tokens(monkeypatch):
    monkeypatch.setattr(forward, "_TILE", TILE)
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    model = LlamaForCausalLM(config)
    text_attention.attend_causally_first(model)
    assert attention_mask(model, torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])).shape == (1, 1, 8, 8)


def test_the_implementation_is_not_saved(loaded, tmp_path):
    model, _ = loaded
    model.save_pretrained(tmp_path / "saved")
    assert text_attention.NAME not in (tmp_path / "saved" / "config.json").read_text()


def test_kernels_whose_gradients_can_be_no_numbers_are_not_used():
    assert not torch.backends.cuda.cudnn_sdp_enabled()

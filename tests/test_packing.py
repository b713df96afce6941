"""A packed question is computed exactly as if asked alone."""

import pytest
import torch
from conftest import make_sample

from firstsight.data.packing import IGNORE, collate, encode, pack
from firstsight.distillation.loss import distillation_loss
from firstsight.evaluation.answering import model_inputs
from firstsight.models.packed import last_hidden_states

QUESTIONS = [
    ("What is in your left hand?", "a red cup"),
    ("How many things are on the table?", "two"),
    ("Where is the ball?", "left side of the table, I believe"),
]
SAMPLES = [
    make_sample("image", "image", 1, QUESTIONS),
    make_sample("frames", "frames", 3, QUESTIONS[:2]),
    make_sample("video", "video", 4, QUESTIONS),
    make_sample("text", "none", 0, QUESTIONS[:1]),
]


def packed(processor, samples):
    features = [pack(processor, sample, encode(processor, sample, sample.records)) for sample in samples]
    return collate(features, processor.tokenizer.pad_token_id)


def states_of(hidden, batch, row, number):
    """The states that predict the answer tokens of record `number` in `row`, and those tokens."""
    labels, segments = batch["labels"][row, 1:], batch["segment_ids"][row, 1:]
    chosen = (labels != IGNORE) & (segments == number)
    return hidden[row, :-1][chosen], labels[chosen]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.media_kind)
@torch.inference_mode()
def test_packed_states_equal_those_of_the_question_alone(model, processor, sample):
    batch = packed(processor, SAMPLES)  # with the others, so that there is padding
    row = SAMPLES.index(sample)
    hidden = last_hidden_states(model, batch)
    for number, record in enumerate(sample.records, start=1):
        states, tokens = states_of(hidden, batch, row, number)
        assert processor.tokenizer.decode(tokens) == record.answer + "<|im_end|>"
        # The model's own forward pass over prompt and answer, nothing of ours between.
        alone = model_inputs(processor, [(sample, record)], "cpu")
        prompt = alone["input_ids"].shape[1]
        alone["input_ids"] = torch.cat([alone["input_ids"], tokens[None]], dim=1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in alone:
                alone[name] = torch.cat([alone[name], torch.full_like(tokens[None], fill)], dim=1)
        model.model.rope_deltas = None
        expected = model.model(**alone).last_hidden_state[0, prompt - 1 : -1]
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_branch_sees_nothing_of_its_siblings(model, processor):
    one, other = (
        make_sample("image", "image", 1, [QUESTIONS[0], second]) for second in (QUESTIONS[1], ("Why?", "because"))
    )
    states = []
    for sample in (one, other):
        batch = packed(processor, [sample])
        states.append(states_of(last_hidden_states(model, batch), batch, 0, 1)[0])
    torch.testing.assert_close(*states, atol=1e-6, rtol=1e-5)


def test_loss_at_alpha_zero_is_the_models_own_labels_loss(model, processor):
    batch = packed(processor, [make_sample("image", "image", 1, QUESTIONS[:1])])
    hidden = last_hidden_states(model, batch)
    states, tokens = states_of(hidden, batch, 0, 1)
    ours = distillation_loss(
        states, model.lm_head.weight, tokens, None, shared_vocabulary=0, temperature=1.0, alpha=0.0
    )
    inputs = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
    theirs = model(**inputs, labels=batch["labels"]).loss
    torch.testing.assert_close(ours.total / len(tokens), theirs, rtol=1e-6, atol=1e-6)


def test_a_pack_holds_the_visual_tokens_once(processor):
    token = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    together = packed(processor, [SAMPLES[2]])["input_ids"]
    alone = model_inputs(processor, [(SAMPLES[2], SAMPLES[2].records[0])], "cpu")["input_ids"]
    assert (together == token).sum() == (alone == token).sum() > 0

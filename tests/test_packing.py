"""A packed question is computed exactly as if asked alone."""

import pytest
import torch
from alone import assert_packed_as_alone, packed, states_of
from conftest import make_sample

from firstsight.generation.answering import model_inputs
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.packing import dataset
from firstsight.packing.dataset import PackedDataset
from firstsight.packing.forward import last_hidden_states
from firstsight.records.parquet import Split, SplitWriter

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


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.media_kind)
def test_packed_states_equal_those_of_the_question_alone(model, processor, sample):
    assert_packed_as_alone(model, processor, SAMPLES, sample)


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


@pytest.mark.parametrize(("kept_bytes", "packed"), [(1 << 30, ["one", "two"]), (0, ["one", "two", "one", "one"])])
def test_a_sample_is_packed_once_as_long_as_it_may_be_kept(processor, tmp_path, monkeypatch, kept_bytes, packed):
    path = tmp_path / "train.parquet"
    with SplitWriter(path) as writer:
        for name in ("one", "two"):
            writer.write(make_sample(name, "image", 1, [("What is this?", f"a {name}")]))
    found, pack = [], dataset.pack

    def noted(processor, sample, encoded):
        found.append(sample.id)
        return pack(processor, sample, encoded)

    monkeypatch.setattr(dataset, "_KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(dataset, "pack", noted)
    repeated = PackedDataset(Split(path).answered({}).repeated_to(3), processor)
    samples = [repeated[index] for index in (0, 1, 2, 0)]  # the third is the first again
    assert found == packed
    for name, tensor in samples[0].items():
        assert torch.equal(samples[2][name], tensor)
        assert torch.equal(samples[3][name], tensor)
    assert not torch.equal(samples[0]["labels"], samples[1]["labels"])

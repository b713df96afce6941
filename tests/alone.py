"""What packed questions are held against: each asked alone, by the model's own forward pass."""

import torch

from firstsight.generation.answering import model_inputs
from firstsight.packing.forward import last_hidden_states
from firstsight.packing.pack import IGNORE, collate, encode, pack


def packed(processor, samples):
    features = [pack(processor, sample, encode(processor, sample, sample.records)) for sample in samples]
    return collate(features, processor.tokenizer.pad_token_id)


def states_of(hidden, batch, row, number):
    """The states that predict the answer tokens of record `number` in `row`, and those tokens."""
    labels, segments = batch["labels"][row, 1:], batch["segment_ids"][row, 1:]
    chosen = (labels != IGNORE) & (segments == number)
    return hidden[row, :-1][chosen], labels[chosen]


@torch.inference_mode()
def assert_packed_as_alone(model, processor, samples, sample):
    """`sample`'s questions, packed and in a batch with the other `samples` (so with padding), as each alone."""
    batch = packed(processor, samples)
    hidden, row = last_hidden_states(model, batch), samples.index(sample)
    for number, record in enumerate(sample.records, start=1):
        states, tokens = states_of(hidden, batch, row, number)
        assert processor.tokenizer.decode(tokens) == record.answer + "<|im_end|>"
        # The prompt as it is asked, and the answer; nothing of packing between.
        alone = model_inputs(processor, [(sample, record)], "cpu")
        prompt = alone["input_ids"].shape[1]
        alone["input_ids"] = torch.cat([alone["input_ids"], tokens[None]], dim=1)
        for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in alone:
                alone[name] = torch.cat([alone[name], torch.full_like(tokens[None], fill)], dim=1)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # Qwen2-VL keeps those of the pass before
        expected = model.model(**alone).last_hidden_state[0, prompt - 1 : -1]
        torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-4)

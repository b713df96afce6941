"""Generate a model's answers: greedy decoding, one question per prompt, in batches padded on the left."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from firstsight.records.prompts import media_inputs, messages
from firstsight.records.sample import Record, Sample

Question = tuple[Sample, Record]


def model_inputs(processor: Any, questions: Sequence[Question], device: str | torch.device) -> dict[str, torch.Tensor]:
    """Return the processor's tensors for a batch of questions, padded on the left, on `device`."""
    texts = [
        processor.apply_chat_template(messages(record, sample), add_generation_prompt=True, tokenize=False)
        for sample, record in questions
    ]
    media: dict[str, Any] = {}
    for sample, _ in questions:
        for name, value in media_inputs(sample).items():
            if isinstance(value, list):
                media.setdefault(name, []).extend(value)
            else:
                media[name] = value
    return processor(text=texts, return_tensors="pt", padding=True, padding_side="left", **media).to(device)


@torch.inference_mode()
def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **limits: int) -> torch.Tensor:
    """Decode greedily and return the new tokens [B, n]; `limits` are max_new_tokens and min_new_tokens."""
    sequences = model.generate(**inputs, do_sample=False, temperature=None, top_p=None, top_k=None, **limits)
    return sequences[:, inputs["input_ids"].shape[1] :]


def answers(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], batch_size: int, max_new_tokens: int
) -> Iterator[str]:
    """Yield the model's answers as text without special tokens, in the order of the questions."""
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        tokens = generate(model, model_inputs(processor, batch, model.device), max_new_tokens=max_new_tokens)
        yield from (text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True))

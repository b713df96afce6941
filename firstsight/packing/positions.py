"""Check that a model has positions for a question with its answer."""

from typing import Any

from firstsight.core.errors import UserError
from firstsight.packing.pack import encode_answers, prompts
from firstsight.records.sample import Sample, Text


def check_positions(processor: Any, sample: Sample, new_tokens: int) -> None:
    """Check that a text-only model has positions for each record's prompt, and its answer or `new_tokens` tokens.

    Other models are not limited: theirs are rotary, and go further than their images and videos.

    Raises:
        UserError: a record is longer; or the sample has images or a video.
    """
    if (most := getattr(processor, "positions", None)) is None:
        return
    _, asked = prompts(processor, sample, sample.records)
    for record, prompt, answer in zip(sample.records, asked, encode_answers(processor, sample.records), strict=True):
        if (length := len(prompt) + max(new_tokens, len(answer))) > most:
            remedy = "shorten the question or the answer, or take a model with more positions"
            if isinstance(record, Text):
                remedy = f"set data.max_tokens to at most {most}, which cuts longer texts"
            raise UserError(
                f"record {record.id}: expected at most {most} tokens, as many as {processor.tokenizer.name_or_path} "
                f"has positions for, found {length}, {len(prompt)} of them in its question; {remedy}"
            )

"""Check that a model has positions for a question with its answer."""

from collections.abc import Sequence
from typing import Any

from firstsight.core.errors import UserError
from firstsight.models.text_processor import EncoderProcessor
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
    if isinstance(processor, EncoderProcessor):
        if sample.frames:
            raise UserError(
                f"{processor.tokenizer.name_or_path}: expected records without media, because an encoder reads text "
                f"alone, found {sample.media_kind} in sample {sample.id}; take a vision-language model"
            )
        asked = processor.encode([record.prompt() for record in sample.records])
        answers: list[list[int]] = [[] for _ in asked]
    else:
        _, asked = prompts(processor, sample, sample.records)
        answers = encode_answers(processor, sample.records)
    for record, prompt, answer in zip(sample.records, asked, answers, strict=True):
        if (length := len(prompt) + max(new_tokens, len(answer))) > most:
            remedy = "shorten the question or the answer, or take a model with more positions"
            if isinstance(record, Text):
                remedy = f"set data.max_tokens to at most {most}, which cuts longer texts"
            raise UserError(
                f"record {record.id}: expected at most {most} tokens, as many as {processor.tokenizer.name_or_path} "
                f"has positions for, found {length}, {len(prompt)} of them in its question; {remedy}"
            )


def classes_tokens(processor: Any, classes: Sequence[str]) -> int:
    """Return the tokens of the longest wording of a class with its end token; 0 without classes, and of an encoder."""
    if isinstance(processor, EncoderProcessor):
        return 0
    return max(wording_tokens(processor, classes), default=0)


def wording_tokens(processor: Any, classes: Sequence[str]) -> list[int]:
    """Return the number of tokens of the wording of each class with its end token, by a language model's tokenizer."""
    texts = [name + processor.tokenizer.eos_token for name in classes]
    return [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []

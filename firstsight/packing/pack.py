"""Pack a sample into one sequence: its images or video once, then all its questions, each as if it were asked alone.

A sample's records are rendered one by one through the model's own processor and chat template, exactly as at
evaluation. Their common prefix (system prompt and visual tokens) is stored once; what differs (question and answer)
follows as branches, one per record. `segment_ids` say which token belongs to which; attention mask and positions are
made from them (`firstsight.packing.forward`), so that a branch attends to the prefix and to itself, and not to other
branches. Eight questions about a clip then take one pass over its frames, with the results of eight passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firstsight.core.errors import UserError
from firstsight.records.prompts import media_inputs, messages
from firstsight.records.sample import Record, Sample, Text

IGNORE = -100
PREFIX, PADDING = 0, -1


@dataclass(frozen=True)
class Encoded:
    """Hold the text of a sample's records as token ids, with the placeholders of images and videos not yet expanded.

    `prompt` is the first record's prompt as text, `prefix` the tokens that all prompts share. `branches` has for each
    record the tokens of its prompt after that prefix, and those of its answer, end of turn included.
    """

    prompt: str
    prefix: list[int]
    branches: tuple[tuple[list[int], list[int]], ...]


def encode(processor: Any, sample: Sample, records: Sequence[Record]) -> Encoded:
    """Render and tokenize each of the sample's `records` alone: the prompt as at evaluation, then the answer."""
    asked, answers = encode_questions(processor, sample, records), encode_answers(processor, records)
    branches = tuple((question, answer) for (question, _), answer in zip(asked.branches, answers, strict=True))
    return Encoded(asked.prompt, asked.prefix, branches)


def encode_answers(processor: Any, records: Sequence[Record]) -> list[list[int]]:
    """Tokenize the answer of each of the `records`, end of turn included, and cut texts to their `max_tokens`."""
    # Not rendered by the template: LLaVA-OneVision's has "assistant \n" in past turns, but "assistant\n" in prompts.
    replies = [record.answer + processor.tokenizer.eos_token for record in records]
    encoded = processor.tokenizer(replies, add_special_tokens=False)["input_ids"]
    # The begin token is a text's whole prompt.
    limits = [record.max_tokens and record.max_tokens - 1 for record in records if isinstance(record, Text)]
    return [answer[:limit] for answer, limit in zip(encoded, limits, strict=True)] if limits else encoded


def encode_questions(processor: Any, sample: Sample, records: Sequence[Record]) -> Encoded:
    """Render and tokenize the prompt of each of the sample's `records`, with no answer tokens."""
    texts, ids = prompts(processor, sample, records)
    shared = _common_prefix(ids)
    return Encoded(texts[0], ids[0][:shared], tuple((question[shared:], []) for question in ids))


def prompts(processor: Any, sample: Sample, records: Sequence[Record]) -> tuple[list[str], list[list[int]]]:
    """Render the prompt of each of the `records`; return the texts and their tokens."""
    texts = prompt_texts(processor, sample, records)
    return texts, processor.tokenizer(texts, add_special_tokens=False)["input_ids"]


def prompt_texts(processor: Any, sample: Sample, records: Sequence[Record]) -> list[str]:
    """Render the prompt of each of the `records`: by the chat template, or a text's begin token and given beginning."""
    if isinstance(records[0], Text):
        return [processor.begin_token + record.question for record in records]
    return processor.apply_chat_template(
        [messages(record, sample) for record in records], add_generation_prompt=True, tokenize=False
    )


def pack(processor: Any, sample: Sample, encoded: Encoded) -> dict[str, Tensor]:
    """Pack a sample and its encoded records into one sequence, by `expand` and `lay_out`."""
    return lay_out(encoded, expand(processor, sample, encoded))


def expand(processor: Any, sample: Sample, encoded: Encoded) -> dict[str, Tensor]:
    """Run the processor over a sample's images or video and the prompt of its first record.

    Returns:
        prefix, prefix_types: int64 [W], the tokens that all prompts share, with each image or video expanded into the
        placeholders of its visual tokens, and their mm_token_type_ids (0 for processors without);
        replaced: int64 [1], how many tokens `encoded.prefix` has;
        and the processor's tensors of images and videos (pixel_values and others).

    Raises:
        UserError: the chat template has the question before the images or video, which then cannot be shared.
    """
    # A template has the begin token itself, if the model wants one.
    media = dict(
        processor(text=[encoded.prompt], return_tensors="pt", add_special_tokens=False, **media_inputs(sample))
    )
    first, types = media.pop("input_ids")[0], media.pop("mm_token_type_ids", None)
    media.pop("attention_mask", None)
    width = len(first) - len(encoded.branches[0][0])
    if first[width:].tolist() != encoded.branches[0][0]:
        raise UserError(
            f"sample {sample.id}: expected its images or video before the question in the chat template, "
            "found visual tokens after it; give the model a template with images and videos first"
        )
    return {
        "prefix": first[:width],
        "prefix_types": torch.zeros(width, dtype=torch.long) if types is None else types[0, :width],
        "replaced": torch.tensor([len(encoded.prefix)]),
        **media,
    }


def lay_out(encoded: Encoded, expanded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lay a sample's encoded records out behind their shared prefix, in one sequence of S tokens.

    `expanded` is what `expand` returned for these records, or for more records of the same sample: the prefix that all
    of those share is then the beginning of theirs.

    Returns:
        input_ids, mm_token_type_ids: int64 [S]; segment_ids: int64 [S], 0 for the prefix and k for the k-th record;
        branch_offsets: int64 [S], how many positions later a token is than if its record were asked alone;
        labels: int64 [S], the answer tokens at their own positions (not shifted), `IGNORE` elsewhere;
        and the tensors of images and videos in `expanded`.
    """
    media = dict(expanded)
    prefix, types, replaced = (media.pop(name) for name in ("prefix", "prefix_types", "replaced"))
    ids = prefix.tolist() + encoded.prefix[int(replaced) :]
    width = len(ids)
    segments, offsets, labels = [PREFIX] * width, [0] * width, [IGNORE] * width
    for number, (question, answer) in enumerate(encoded.branches, start=1):
        length = len(question) + len(answer)
        offsets += [len(ids) - width] * length
        segments += [number] * length
        labels += [IGNORE] * len(question) + answer
        ids += question + answer
    mm_types = torch.zeros(len(ids), dtype=torch.long)
    mm_types[: len(types)] = types
    return {
        "input_ids": torch.tensor(ids),
        "mm_token_type_ids": mm_types,
        "segment_ids": torch.tensor(segments),
        "branch_offsets": torch.tensor(offsets),
        "labels": torch.tensor(labels),
        **media,
    }


def _common_prefix(sequences: list[list[int]]) -> int:
    """Return the length of the longest common prefix that leaves every sequence at least one token."""
    limit = min(map(len, sequences)) - 1
    for position in range(limit):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return limit


def collate(features: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad packed samples on the right into one batch [B, S] and concatenate their image and video tensors.

    `token_labels` are there where samples are packed to score classes (`firstsight.packing.dataset`).
    """
    fill = {
        "input_ids": pad_token_id,
        "mm_token_type_ids": 0,
        "segment_ids": PADDING,
        "branch_offsets": 0,
        "labels": IGNORE,
        "token_labels": IGNORE,
    }
    batch = {
        name: pad_sequence([feature[name] for feature in features], batch_first=True, padding_value=value)
        for name, value in fill.items()
        if name in features[0]
    }
    media = sorted({name for feature in features for name in feature} - set(fill))
    return batch | {
        name: _concatenate(name, [feature[name] for feature in features if name in feature]) for name in media
    }


def _concatenate(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate the image or video tensors of several samples.

    LLaVA's images are [images, patches, ...] with differing numbers of patches: they are padded with zeros, which the
    model removes. Its videos cannot be padded.

    Raises:
        UserError: tensors of different shapes that the model takes as one.
    """
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    if name == "pixel_values" and len({tensor.shape[2:] for tensor in tensors}) == 1:
        return pad_sequence([image for tensor in tensors for image in tensor], batch_first=True)
    raise UserError(
        f"{name}: expected media of one shape in a batch, found {[list(one.shape[1:]) for one in tensors][:4]}; "
        "this model needs batch_size: 1 for videos of different lengths"
    )

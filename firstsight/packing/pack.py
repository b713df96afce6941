"""One sample, one sequence: a media with all its questions, its visual tokens shared, each question as if asked alone.

A sample's records are rendered one by one through the model's own processor and chat template, exactly as they are
asked at evaluation. Their common beginning (system prompt and media) is kept once, as the prefix; what differs
(question and answer) follows as branches. `segment_ids` say which token belongs where; attention and positions are
made from them (`firstsight.packing.forward`), so that a branch sees the prefix and itself and nothing of its siblings.
Eight questions about a clip then cost one pass over its frames, and nothing else changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firstsight.core.errors import UserError
from firstsight.records.prompts import media_inputs, messages
from firstsight.records.sample import Record, Sample

IGNORE = -100
PREFIX, PADDING = 0, -1


@dataclass(frozen=True)
class Encoded:
    """The text of a sample's records as token ids, media placeholders not yet expanded.

    `prompt` is the first record's prompt as text; `branches` are what follows the tokens that all prompts begin with:
    the rest of each prompt, and its answer up to and including the end of the turn.
    """

    prompt: str
    branches: tuple[tuple[list[int], list[int]], ...]

    def answers(self) -> list[list[int]]:
        """The answer tokens of each record."""
        return [answer for _, answer in self.branches]


def encode(processor: Any, sample: Sample, records: Sequence[Record]) -> Encoded:
    """Render and tokenize `records`, all about `sample`, each alone: the prompt as at evaluation, then the answer."""
    prompts = processor.apply_chat_template(
        [messages(record, sample) for record in records], add_generation_prompt=True, tokenize=False
    )
    # Not as the template renders a past turn: LLaVA-OneVision's writes "assistant \n" there, and prompts "assistant\n".
    replies = [record.answer + processor.tokenizer.eos_token for record in records]
    ids = processor.tokenizer([*prompts, *replies], add_special_tokens=False)["input_ids"]
    prompt_ids, reply_ids = ids[: len(records)], ids[len(records) :]
    shared = _common_prefix(prompt_ids)
    branches = tuple((question[shared:], reply) for question, reply in zip(prompt_ids, reply_ids, strict=True))
    return Encoded(prompts[0], branches)


def pack(processor: Any, sample: Sample, encoded: Encoded) -> dict[str, Tensor]:
    """Pack a sample and its encoded records into one sequence of S tokens.

    Returns:
        input_ids, mm_token_type_ids: int64 [S]; segment_ids: int64 [S], 0 for the prefix and k for the k-th record;
        branch_offsets: int64 [S], by how much a token stands later than if its record were asked alone;
        labels: int64 [S], the answer tokens in their own places (shift by one to predict), `IGNORE` elsewhere;
        and the processor's own media tensors (pixel_values and the like).

    Raises:
        UserError: the chat template puts the question before the media, which then cannot be shared.
    """
    media = dict(processor(text=[encoded.prompt], return_tensors="pt", **media_inputs(sample)))
    first, types = media.pop("input_ids")[0], media.pop("mm_token_type_ids", None)
    media.pop("attention_mask", None)
    # The processor expands each media placeholder of the prefix into as many tokens as the media takes.
    width = len(first) - len(encoded.branches[0][0])
    if first[width:].tolist() != encoded.branches[0][0]:
        raise UserError(
            f"sample {sample.id}: expected its media before the question in the chat template, "
            "found media tokens after it; give the model a template with media first"
        )

    ids, segments, offsets, labels = first[:width].tolist(), [PREFIX] * width, [0] * width, [IGNORE] * width
    for number, (question, answer) in enumerate(encoded.branches, start=1):
        length = len(question) + len(answer)
        offsets += [len(ids) - width] * length
        segments += [number] * length
        labels += [IGNORE] * len(question) + answer
        ids += question + answer
    mm_types = torch.zeros(len(ids), dtype=torch.long)
    if types is not None:
        mm_types[:width] = types[0, :width]
    return {
        "input_ids": torch.tensor(ids),
        "mm_token_type_ids": mm_types,
        "segment_ids": torch.tensor(segments),
        "branch_offsets": torch.tensor(offsets),
        "labels": torch.tensor(labels),
        **media,
    }


def _common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix, at least one token short of each sequence, so that every branch has one."""
    limit = min(map(len, sequences)) - 1
    for position in range(limit):
        if len({sequence[position] for sequence in sequences}) > 1:
            return position
    return limit


def collate(features: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Pad packed samples on the right into one batch [B, S] and concatenate their media tensors."""
    fill = {
        "input_ids": pad_token_id,
        "mm_token_type_ids": 0,
        "segment_ids": PADDING,
        "branch_offsets": 0,
        "labels": IGNORE,
    }
    batch = {
        name: pad_sequence([feature[name] for feature in features], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }
    media = sorted({name for feature in features for name in feature} - set(fill))
    return batch | {name: _join(name, [feature[name] for feature in features if name in feature]) for name in media}


def _join(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Media tensors one after the other. LLaVA's images come as [images, patches, ...], of as many patches as each
    needs; the model cuts off the zeros that even them out. Its videos it cannot even out.

    Raises:
        UserError: media of several shapes that the model takes as one tensor.
    """
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    if name == "pixel_values" and len({tensor.shape[2:] for tensor in tensors}) == 1:
        return pad_sequence([image for tensor in tensors for image in tensor], batch_first=True)
    raise UserError(
        f"{name}: expected media of one shape in a batch, found {[list(one.shape[1:]) for one in tensors][:4]}; "
        "this model wants batch_size: 1 for videos of different lengths"
    )

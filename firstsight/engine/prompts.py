"""Turn questions into the decoder's inputs: the chat template, tokens, and Qwen2-VL's positions, in numpy."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from firstsight.core.errors import UserError
from firstsight.engine.layout import CHAT_TEMPLATE, TOKENIZER, Layout
from firstsight.engine.pictures import Patches, patches
from firstsight.records.prompts import messages
from firstsight.records.sample import Record, Sample

Question = tuple[Sample, Record]


@dataclass(frozen=True)
class Batch:
    """Hold a batch of questions, padded on the left.

    `tokens` and `mask` are [B, S], the mask 1 at tokens and 0 at padding. `positions` are [3, B, S] (time, height,
    width), or [B, S] for a model of text alone. `media` are the different images and clips, and `shown` the index
    among them of each one in the prompts, in the order of the batch.
    """

    tokens: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    media: tuple[Patches, ...]
    shown: tuple[int, ...]


class Prompts:
    """Encode questions, and decode answers, as the processor does that the model was trained with.

    Raises:
        UserError: the folder's tokenizer or chat template cannot be read.
    """

    def __init__(self, folder: Path, layout: Layout):
        self._layout = layout
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
        try:
            self._template = environment.from_string((folder / CHAT_TEMPLATE).read_text(encoding="utf-8"))
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(
                f"{folder}: expected a tokenizer and a chat template, found {str(error)[:200]}; export the model again "
                "(dvc repro)"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def batch(self, questions: Sequence[Question]) -> Batch:
        """Return the inputs of questions, each asked alone. Questions about the same sample share its media.

        Raises:
            UserError: a sample has media and the model reads text alone, or its media cannot be used.
        """
        media: list[Patches] = []
        seen: dict[str, range] = {}
        for sample, _ in questions:
            if sample.id not in seen:
                found = self._media(sample)
                seen[sample.id] = range(len(media), len(media) + len(found))
                media += found
        rows = [self._tokens(question, [media[index] for index in seen[question[0].id]]) for question in questions]
        length = max(map(len, rows))
        tokens = np.full((len(rows), length), self._layout.pad_token, np.int64)
        mask = np.zeros((len(rows), length), np.int64)
        axes = 3 if self._layout.pictures else 1
        positions = np.zeros((axes, len(rows), length), np.int64)
        for number, ((sample, _), row) in enumerate(zip(questions, rows, strict=True)):
            start = length - len(row)
            tokens[number, start:], mask[number, start:] = row, 1
            positions[:, number, start:] = self._positions(row, [media[index] for index in seen[sample.id]])
        shown = tuple(index for sample, _ in questions for index in seen[sample.id])
        return Batch(tokens, mask, positions if axes == 3 else positions[0], tuple(media), shown)

    def visual(self, tokens: np.ndarray) -> np.ndarray:
        """Return where tokens stand for images and clips, as booleans of the same shape."""
        settings = self._layout.pictures
        if settings is None:
            return np.zeros(tokens.shape, bool)
        # Not by np.isin, which takes ten times as long over so few tokens.
        return (tokens == settings.image_token) | (tokens == settings.video_token)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True).strip()

    def tokens_of(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without special tokens around it."""
        return [len(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def _media(self, sample: Sample) -> list[Patches]:
        if sample.media_kind == "none":
            return []
        if self._layout.pictures is None:
            raise UserError(
                f"{sample.id}: expected records without media, because this model reads text alone, found an image or "
                "a video; take a vision-language model, or data without media"
            )
        frames = sample.images()
        if sample.media_kind == "video":
            return [patches(frames, True, self._layout.pictures)]
        return [patches([frame], False, self._layout.pictures) for frame in frames]

    def _tokens(self, question: Question, media: Sequence[Patches]) -> list[int]:
        """Return a question's tokens: its placeholders are repeated, once for each visual token."""
        turns = messages(question[1], question[0])
        settings = self._layout.pictures
        if settings is None:
            # Templates of text models know content as text alone.
            turns = [turn | {"content": "".join(part["text"] for part in turn["content"])} for turn in turns]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._layout.special_tokens)
        except TemplateError as error:
            raise UserError(f"{CHAT_TEMPLATE}: expected a chat template, found {error}; dvc repro") from None
        rest = iter(media)
        tokens: list[int] = []
        # A template has the begin token itself, if the model wants one.
        for token in self.tokens_of(text):
            stands = settings is not None and token in (settings.image_token, settings.video_token)
            tokens += [token] * (next(rest).tokens(settings) if stands else 1)
        return tokens

    def _positions(self, tokens: Sequence[int], media: Sequence[Patches]) -> np.ndarray:
        """Return the positions [3, S], or [1, S] without pictures, of one prompt.

        Text counts up in all three; the tokens of an image or clip have their place in time, height and width, and
        text after them begins one side after their first position.
        """
        settings = self._layout.pictures
        if settings is None:
            return np.arange(len(tokens))[None]
        visual = self.visual(np.asarray(tokens))
        found, place, position = [], 0, 0
        for one in media:
            before = int(visual[place:].argmax())  # tokens of text
            found.append(_counted(position, before))
            steps, height, width = one.grid[0], *(side // settings.merge_size for side in one.grid[1:])
            found.append(position + before + np.indices((steps, height, width)).reshape(3, -1))
            place, position = place + before + steps * height * width, position + before + max(height, width)
        found.append(_counted(position, len(tokens) - place))
        return np.concatenate(found, axis=1)


def _counted(first: int, length: int) -> np.ndarray:
    """Return positions [3, length] that count up from `first` on each axis."""
    return np.broadcast_to(np.arange(first, first + length), (3, length))


def _refuse(message: Any) -> None:
    raise TemplateError(str(message))

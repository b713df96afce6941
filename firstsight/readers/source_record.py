"""What every source is read into: one question, and the media it is about, before anything is decoded."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from firstsight.core.params import Data
from firstsight.readers.problems import BadRecordError
from firstsight.records.sample import LETTERS, MediaKind, Record

# A question of a megabyte is a broken file, and would break the training it got into.
MAX_CHARACTERS = 20_000

# Where media go in the text of a data set for LLaVA. To a model of that family they are media.
PLACEHOLDER = r"<(?:image|video|speech|audio)>"

Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DecodedMedia:
    """Decoded media: JPEG bytes, one for an image, several for frames or a video; `fps` is a video's sampled rate."""

    frames: tuple[bytes, ...] = ()
    fps: float = 0.0


class Media(Protocol):
    """Where pictures come from: files, a row of a data set, a scene to render. Can be pickled: workers load it."""

    kind: MediaKind

    def key(self) -> str:
        """Equal keys are the same pictures. Stable from run to run, whatever machine the data is on."""

    def group(self) -> tuple[str, ...]:
        """What this media shows a part of: videos, episodes, images. Media that share one of them share a split."""

    def titles(self) -> tuple[str, ...]:
        """What it is called, where ids of videos may stand."""

    def origins(self) -> tuple[str, ...]:
        """What `group` says, under names that mean the same in every source."""

    def stamp(self) -> object:
        """As JSON, what tells that the pictures have changed under the same key."""

    def load(self, data: Data) -> DecodedMedia:
        """Decoded, sampled and resized.

        Raises:
            BadRecordError: it cannot be.
        """


def special_token(text: str) -> str | None:
    """The first in a text. A model reads <|im_end|> or <image> as what it means in its chat template, not as text."""
    found = re.search(rf"<\|\w+\|>|{PLACEHOLDER}", text)
    return found and found[0]


class SourceRecord(BaseModel):
    """One question as a source has it, validated.

    `options` are texts, and `answer` and `answers` then the letter of one, or its text; letters come out. Without an
    `answer` the question is unanswered, see `data.unanswered`. `group` overrides the media's; `split` the hash's.

    Raises:
        ValidationError: a value is not what it should be; `question` turns it into a BadRecordError.
    """

    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True, frozen=True)

    place: str
    id: Text
    question: Text
    answer: Text | None = None
    answers: tuple[Text, ...] = ()
    options: Annotated[tuple[Text, ...], Field(max_length=len(LETTERS))] = ()
    question_type: Text = "open"
    group: Text | None = None
    split: SplitName | None = None

    @field_validator("question", "answer", "answers", "options")
    @classmethod
    def _plain_text(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for text in (value,) if isinstance(value, str) else value or ():
            if token := special_token(text):
                raise ValueError(f"expected plain text, found the special token {token!r}")
        return value

    @model_validator(mode="after")
    def _distinct_options(self) -> "SourceRecord":
        if len(set(self.options)) < len(self.options) or len(self.options) == 1:
            raise ValueError(f"expected two or more different options, found {list(self.options)!r}")
        return self

    def accepted(self) -> tuple[str, ...]:
        """All answers that count as right, the one to teach first; letters where there are options.

        Raises:
            BadRecordError: an answer is not among the options.
        """
        answers = [text for text in (self.answer, *self.answers) if text is not None]
        if self.options:
            answers = [self._letter(text) for text in answers]
        return tuple(dict.fromkeys(answers))

    def to_record(self) -> Record:
        """As it is kept in the data set; an unanswered question has an empty answer there."""
        accepted = self.accepted()
        return Record(
            id=self.id,
            question=self.question,
            answer=accepted[0] if accepted else "",
            answers=accepted,
            question_type=self.question_type,
            options=self.options,
        )

    def _letter(self, answer: str) -> str:
        letters = LETTERS[: len(self.options)]
        if answer in self.options:
            return letters[self.options.index(answer)]
        if len(answer) == 1 and answer in letters:
            return answer
        raise BadRecordError(
            f"expected the answer to be a letter of {letters!r} or an option's text, found {answer[:60]!r}; correct it"
        )


@dataclass(frozen=True)
class Asked:
    """A question about media; None is a question that stands alone."""

    record: SourceRecord
    media: Media | None


def source_record(place: str, **values: Any) -> SourceRecord:
    """A validated question; values that are None are left out.

    Raises:
        BadRecordError: names the first wrong value.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
    try:
        made = SourceRecord(place=place, **given)
    except ValidationError as error:
        raise BadRecordError(f"{describe(error)}; correct it") from None
    made.accepted()
    return made


# What pydantic calls an expectation, in the words of a record.
_EXPECTED = {
    "missing": "a value",
    "string_type": "text",
    "string_too_short": "text",
    "string_unicode": "text",
    "string_too_long": "at most {max_length} characters",
    "tuple_type": "a list",
    "too_long": "at most {max_length} values",
    "literal_error": "{expected}",
}
_FOUND = {
    "missing": "none",
    "string_too_short": "an empty one",
    "string_unicode": "half of a character (a lone surrogate)",
    "too_long": "{actual_length}",
}


def describe(error: ValidationError) -> str:
    """The first of pydantic's complaints as one line."""
    first = error.errors(include_url=False)[0]
    kind, context, key = first["type"], first.get("ctx", {}), ".".join(map(str, first["loc"]))
    if kind == "value_error":
        return f"{key}: {context['error']}".removeprefix(": ")
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else first["msg"]
    found = _FOUND[kind].format(**context) if kind in _FOUND else f"{str(first['input'])[:60]!r}"
    return f"expected {expected} for {key!r}, found {found}"

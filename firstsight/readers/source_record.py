"""Define what every reader yields: one validated question and the image or video it asks about, not yet decoded.

A source may hold texts in the place of questions, for language modelling.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from firstsight.core.params import Data
from firstsight.core.validation import describe
from firstsight.readers.problems import BadRecordError
from firstsight.records.sample import LETTERS, MediaKind, Record, composed

# A longer text is a sign of a broken file, and would exhaust memory in training.
MAX_CHARACTERS = 20_000
# A text may be a whole document: `data.max_tokens` cuts it.
MAX_TEXT_CHARACTERS = 1_000_000

# These mark where an image, video or sound goes in LLaVA's data; models of that family read them as such.
PLACEHOLDER = r"<(?:image|video|speech|audio)>"
MEDIA_PLACEHOLDER = r"<(?:image|video)>"

# The fields that a text does not have.
OF_QUESTIONS = ("question", "answer", "answers", "options")

Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
SplitName = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class DecodedMedia:
    """Hold frames as JPEG bytes: one for an image, several for frames or a video. `fps` is a video's sampling rate."""

    frames: tuple[bytes, ...] = ()
    fps: float = 0.0


class Media(Protocol):
    """Name an undecoded image, list of frames or video: files, a row of a data set, a scene to render. Picklable."""

    @property
    def kind(self) -> MediaKind:
        """Return which of these it is: an image, frames or a video."""

    def key(self) -> str:
        """Return a name that is equal for equal media, and the same in every run on every machine."""

    def group(self) -> tuple[str, ...]:
        """Return the videos, episodes or images that this is a part of. Media that share one go to the same split."""

    def titles(self) -> tuple[str, ...]:
        """Return the names by which the source calls it, which may contain ids of videos."""

    def origins(self) -> tuple[str, ...]:
        """Return the parts of `group` under names that mean the same in every source."""

    def stamp(self) -> object:
        """Return a JSON value that changes when the content changes under the same key."""

    def load(self, data: Data) -> DecodedMedia:
        """Return the frames: decoded, sampled and resized.

        Raises:
            BadRecordError: the media cannot be decoded.
        """


def special_token(text: str) -> str | None:
    """Return the first special token in a text, such as <|im_end|> or <image>, which a model would not read as text."""
    found = re.search(rf"<\|\w+\|>|{PLACEHOLDER}", text)
    return found and found[0]


class SourceRecord(BaseModel):
    """Hold one question as a source states it, validated.

    If there are `options`, `answer` and `answers` are letters or texts of options. Without an `answer` the question is
    unanswered, see `data.unanswered`. `group` overrides the group of the media, and `split` the split chosen by hash.
    Question, answers and options are in Unicode's composed form, see `composed`.

    Raises:
        ValidationError: a value is wrong; `source_record` turns it into a BadRecordError.
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

    @field_validator("question", "answer", "answers", "options", "text", check_fields=False)
    @classmethod
    def _plain_text(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        for text in (value,) if isinstance(value, str) else value or ():
            if token := special_token(text):
                raise ValueError(f"expected plain text, found the special token {token!r}")
        if isinstance(value, tuple):
            return tuple(map(composed, value))
        return value and composed(value)

    @model_validator(mode="after")
    def _distinct_options(self) -> "SourceRecord":
        if len(set(self.options)) < len(self.options) or len(self.options) == 1:
            raise ValueError(f"expected two or more different options, found {list(self.options)!r}")
        return self

    @property
    def wording(self) -> str:
        """Return the words by which equal questions about the same image or video, or about text, are recognised."""
        return self.question

    def accepted(self) -> tuple[str, ...]:
        """Return all accepted answers, the training target first; as letters if there are options.

        Raises:
            BadRecordError: an answer is not one of the options.
        """
        answers = [text for text in (self.answer, *self.answers) if text is not None]
        if self.options:
            answers = [self._letter(text) for text in answers]
        return tuple(dict.fromkeys(answers))

    def to_record(self) -> Record:
        """Return the record that is written to the data set; an unanswered question has an empty answer."""
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


class SourceText(SourceRecord):
    """Hold one text as a source states it, validated: a record without a question, whose answer is the text."""

    question: Literal[""] = ""
    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    question_type: Text = "text"

    @property
    def wording(self) -> str:
        return self.text

    def accepted(self) -> tuple[str, ...]:
        return (self.text,)


@dataclass(frozen=True)
class Asked:
    """Hold a record with the image or video it asks about; None for a question about text alone."""

    record: SourceRecord
    media: Media | None


def source_record(place: str, **values: Any) -> SourceRecord:
    """Return a validated record from its fields; values of None count as not given. With a `text`, it is a text.

    Raises:
        BadRecordError: a value is wrong; the message names the first.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if v is not None}
    if "text" in given and (asked := [name for name in OF_QUESTIONS if given.get(name)]):
        raise BadRecordError(
            f"expected a question or a text, found 'text' and {asked[0]!r}; leave one out, or put the text into the "
            "question"
        )
    try:
        made = (SourceText if "text" in given else SourceRecord)(place=place, **given)
    except ValidationError as error:
        raise BadRecordError(f"{describe(error)}; correct it") from None
    made.accepted()
    return made

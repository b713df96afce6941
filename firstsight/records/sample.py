"""Define records and samples, the units of training and evaluation.

A record is one question with its answer, or a text, which language models learn to continue. A sample is an image, a
list of frames or a video (decoded once, when the data set is built, and stored as JPEG bytes) with the records that ask
about it; a text is the only record of a sample without any.
"""

import io
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

SPLITS = ("train", "validation", "test")
MediaKind = Literal["none", "image", "frames", "video"]
# The most characters of a text that a model is given to continue.
BEGINNING = 160
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def composed(text: str) -> str:
    """Return the text in Unicode's composed form (NFC), in which all text is stored and asked.

    Tokenizers such as Qwen2's compose it anyway, so that a model's answers are in this form; others do not, and would
    take one word for two. NFKC, which changes meanings (10² becomes 102), is for comparing answers alone.
    """
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Record:
    """Hold one question with its answers.

    `answer` is the training target; evaluation accepts any of `answers`, which include it. A question that the teacher
    is to answer has an empty `answer`.
    """

    id: str
    question: str
    answer: str
    answers: tuple[str, ...]
    question_type: str
    options: tuple[str, ...] = ()

    def prompt(self) -> str:
        """Return the prompt: the question, then any options with letters, one a line (lmms-eval's EgoSchema format)."""
        if not self.options:
            return self.question
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        closing = "Answer with the option's letter from the given choices directly."
        return "\n".join([self.question, *listed, closing])


@dataclass(frozen=True)
class Text(Record):
    """Hold a text for language modelling: nothing is asked, and the text is the `answer`.

    A model reads it after its begin token alone. `question` is empty; where a text is continued, to measure that, it is
    the beginning that the model is given, and `answer` is the rest. A text is cut to `max_tokens` tokens, the begin
    token among them, where it is encoded (None: it is not cut); one that is cut has no end token.
    """

    max_tokens: int | None = None

    def continued(self) -> "Text":
        """Return the text as it is continued: its beginning as the question, the rest as the answer.

        The beginning is half of the text, at most `BEGINNING` characters, up to the last space in it, if there is one.
        """
        most = min(len(self.answer) // 2, BEGINNING)
        place = self.answer.rfind(" ", 0, most + 1)
        place = most if place <= 0 else place
        beginning, rest = self.answer[:place], self.answer[place:]
        return replace(self, question=beginning, answer=rest, answers=(rest,))


def as_asked(record: Record) -> Record:
    """Return the record as a model answers it: a question as it is, a text with its beginning given."""
    return record.continued() if isinstance(record, Text) else record


@dataclass(frozen=True)
class Sample:
    """Hold an image, list of frames or video, with the records that ask about it.

    `frames` are JPEG bytes: one for an image, several for frames or a video, none for records about text alone. `group`
    names what must not be in two splits (the video, episode or scene). `fps` is the rate at which a video's frames were
    sampled, in frames per second (0 for other kinds).
    """

    id: str
    group: str
    source: str
    media_kind: MediaKind
    frames: tuple[bytes, ...]
    fps: float
    records: tuple[Record, ...]

    def images(self) -> list[Image.Image]:
        """Return the frames decoded as RGB images."""
        return [Image.open(io.BytesIO(frame)).convert("RGB") for frame in self.frames]

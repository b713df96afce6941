"""Records and samples: what the pipeline learns from and is tested on.

A record is one question with its answer. A sample is an image or a clip (its frames decoded once, at build time, and
kept as JPEG bytes) with the records that ask about it.
"""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

SPLITS = ("train", "validation", "test")
MediaKind = Literal["none", "image", "frames", "video"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Record:
    """One question. `answer` is taught; any of `answers` (which include it) counts as right at evaluation.

    An unanswered question, which the teacher is to answer, has an empty `answer`.
    """

    id: str
    question: str
    answer: str
    answers: tuple[str, ...]
    question_type: str
    options: tuple[str, ...] = ()

    def prompt(self) -> str:
        """The question as the model reads it; options follow one a line, with letters (lmms-eval's EgoSchema form)."""
        if not self.options:
            return self.question
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        closing = "Answer with the option's letter from the given choices directly."
        return "\n".join([self.question, *listed, closing])


@dataclass(frozen=True)
class Sample:
    """One media and its records. `frames` are JPEG bytes: one for an image, several for frames or a video.

    `group` names what must not straddle splits (the video, episode or scene); `fps` is the rate at which a video's
    frames were sampled (0 for other kinds).
    """

    id: str
    group: str
    source: str
    media_kind: MediaKind
    frames: tuple[bytes, ...]
    fps: float
    records: tuple[Record, ...]

    def images(self) -> list[Image.Image]:
        """The frames, decoded, as RGB images."""
        return [Image.open(io.BytesIO(frame)).convert("RGB") for frame in self.frames]

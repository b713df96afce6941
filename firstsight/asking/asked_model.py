"""Load a model once, then answer one question at a time and measure how long each answer takes."""

import time
from dataclasses import dataclass
from pathlib import Path

from firstsight.asking.folder import check_there
from firstsight.core.errors import UserError
from firstsight.core.params import Data, Evaluate
from firstsight.generation.answering import answers
from firstsight.models.loading import load_model, load_processor
from firstsight.readers.media import files
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import special_token
from firstsight.records.sample import Record, Sample, composed


@dataclass(frozen=True)
class Answer:
    """Hold a model's answer, and the seconds from decoded frames and text to the last token."""

    text: str
    seconds: float

    def line(self) -> str:
        """Return the text as one line for a table, or "(nothing)" if it is empty."""
        return " ".join(self.text.split()) or "(nothing)"


class AskedModel:
    """Load a model with its processor, to answer questions; `load_seconds` is the time that loading took.

    Raises:
        UserError: the folder holds no model, or as for `load_processor` and `load_model`.
    """

    def __init__(self, folder: Path, settings: Evaluate, device: str):
        check_there(folder)
        self.folder, self._settings = folder, settings
        started = time.perf_counter()
        self._processor = load_processor(folder)
        self._model = load_model(folder, settings.precision, device)
        self.load_seconds = time.perf_counter() - started

    def answer(self, sample: Sample) -> Answer:
        """Answer the sample's question."""
        started = time.perf_counter()
        question = (sample, sample.records[0])
        (text,) = answers(self._model, self._processor, [question], 1, self._settings.asked_tokens())
        return Answer(text, time.perf_counter() - started)


def question_about(path: Path, question: str, data: Data) -> Sample:
    """Return a sample of one question about an image or a video, which is sampled and resized as in the data set.

    Raises:
        UserError: the question is empty or has a special token, or the file is missing or cannot be read.
    """
    if not question.strip():
        raise UserError("question: expected some text, found none; ask something")
    if token := special_token(question):
        raise UserError(f"question: expected plain text, found the special token {token!r}; leave it out")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: expected an image or a video, found {found}; correct the path")
    # Links are followed: a data set refuses links out of its folder, but here the user named the file.
    path = path.resolve()
    try:
        media = files(path.parent, path.name)
        pictures = media.load(data)
    except BadRecordError as error:
        raise UserError(str(error)) from None
    record = Record("asked", composed(question.strip()), "", (), "open")
    return Sample("asked", "asked", "asked", media.kind, pictures.frames, pictures.fps, (record,))


def seen(sample: Sample) -> str:
    """Describe the frames that a model sees of a sample, such as "8 frames of 112 x 112 pixels, 2 a second"."""
    first, *rest = sample.images()
    size = f"{first.width} x {first.height} pixels"
    if sample.media_kind != "video":
        return f"an image of {size}"
    return f"{len(rest) + 1} frames of {size}, {sample.fps:.3g} a second"

"""A model that a person asks: loaded once, it answers one question at a time and says how long that took."""

import time
from dataclasses import dataclass
from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.params import Data, Evaluate
from firstsight.data.records import Record, Sample
from firstsight.evaluation.answering import answers
from firstsight.models.loading import load_model, load_processor
from firstsight.sources.media import files
from firstsight.sources.problems import BadRecord


@dataclass(frozen=True)
class Answer:
    """What a model says, and the seconds it took from pictures and text to the last token."""

    text: str
    seconds: float


class AskedModel:
    """A model folder, ready to answer.

    Raises:
        UserError: as `load_model`.
    """

    def __init__(self, folder: Path, settings: Evaluate, device: str):
        self.folder, self._settings = folder, settings
        started = time.perf_counter()
        self._processor = load_processor(folder)
        self._model = load_model(folder, settings.precision, device)
        self.load_seconds = time.perf_counter() - started

    def answer(self, sample: Sample) -> Answer:
        """To the sample's one question."""
        started = time.perf_counter()
        (text,) = answers(
            self._model, self._processor, [(sample, sample.records[0])], 1, self._settings.max_new_tokens
        )
        return Answer(text, time.perf_counter() - started)


def question_about(path: Path | None, question: str, data: Data) -> Sample:
    """A question about an image or a video, sampled and resized as the data set's are; None is about nothing.

    Raises:
        UserError: there is no question, or the file cannot be read.
    """
    if not question.strip():
        raise UserError("expected a question, found none; ask something")
    record = Record("asked", question.strip(), "", (), "open")
    if path is None:
        return Sample("asked", "asked", "asked", "none", (), 0.0, (record,))
    try:
        media = files(path.parent, path.name)
        pictures = media.load(data)
    except BadRecord as error:
        raise UserError(f"{path}: {error}") from None
    return Sample("asked", "asked", "asked", media.kind, pictures.frames, pictures.fps, (record,))

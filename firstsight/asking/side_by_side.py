"""Ask several models the same question, for the web page."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from firstsight.asking.asked_model import AskedModel
from firstsight.asking.folder import reads_text_alone, template_of
from firstsight.asking.question import question_about, question_alone
from firstsight.core.errors import UserError
from firstsight.core.params import Data

COLUMNS = ["model", "answer", "ms"]


def answered(
    models: Sequence[AskedModel], path: Path | None, question: str, data: Data
) -> tuple[list[Image.Image], list[list[str]]]:
    """Return the frames that the models see, and one row per model with the cells of `COLUMNS`.

    Without a file (`path` None), models that read text alone are each asked by the prompt template of their own.

    Raises:
        UserError: no file was given, though a model takes one; or as `question_about` and `question_alone`.
    """
    if path is None:
        if not all(reads_text_alone(model.folder) for model in models):
            raise UserError("media: expected an image or a video, found none; upload one")
        samples = [question_alone(question, template_of(model.folder, data)) for model in models]
    else:
        try:
            samples = [question_about(path, question, data)] * len(models)
        except UserError as error:
            # The temporary folder of an upload means nothing to the user.
            raise UserError(str(error).replace(str(path), path.name)) from None
    answers = [(model.folder, model.answer(sample)) for model, sample in zip(models, samples, strict=True)]
    rows = [[str(folder), one.line(), f"{1000 * one.seconds:.0f}"] for folder, one in answers]
    return samples[0].images(), rows

"""Ask several models the same question, for the web page."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from firstsight.asking.asked_model import AskedModel
from firstsight.asking.question import question_about
from firstsight.core.errors import UserError
from firstsight.core.params import Data

COLUMNS = ["model", "answer", "ms"]


def answered(
    models: Sequence[AskedModel], path: Path | None, question: str, data: Data
) -> tuple[list[Image.Image], list[list[str]]]:
    """Return the frames that the models see, and one row per model with the cells of `COLUMNS`.

    Raises:
        UserError: no file was given (`path` None), or as `question_about`.
    """
    if path is None:
        raise UserError("media: expected an image or a video, found none; upload one")
    try:
        sample = question_about(path, question, data)
    except UserError as error:
        # The temporary folder of an upload means nothing to the user.
        raise UserError(str(error).replace(str(path), path.name)) from None
    answers = [(model.folder, model.answer(sample)) for model in models]
    return sample.images(), [[str(folder), one.line(), f"{1000 * one.seconds:.0f}"] for folder, one in answers]

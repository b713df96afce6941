"""Make a sample of a question: about an image or a video file, as in the data set, or of text alone."""

import json
from pathlib import Path
from typing import Any

from firstsight.core.classes import template_columns
from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.columns import filled
from firstsight.readers.media import files
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import special_token
from firstsight.readers.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from firstsight.records.sample import Record, Sample, composed


def question_about(path: Path, question: str, data: Data) -> Sample:
    """Return a sample of one question about an image or a video, which is sampled and resized as in the data set.

    Raises:
        UserError: the question is empty or has a special token, or the file is missing or cannot be read.
    """
    _check_text(question)
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
    record = _record(question.strip())
    return Sample("asked", "asked", "asked", media.kind, pictures.frames, pictures.fps, (record,))


def question_alone(text: str, template: str | None) -> Sample:
    """Return a sample of a question without media.

    Args:
        text: the question; with a `template`, what its column is filled with, or, if it has several, a JSON object of
            them.
        template: the prompt template from whose columns the model's questions were made; None: there was none.

    Raises:
        UserError: the text is empty, has a special token, or is not an object of the columns; or it names a file, about
            which nothing is asked.
    """
    _check_text(text)
    try:
        there = Path(text).is_file()
    except OSError:  # longer than names of files can be
        there = False
    # A text may end in the name of a file, but a name of one word is hardly a question.
    if there or (" " not in text.strip() and Path(text).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES):
        raise UserError(f"question: expected some text after the file {text}, found none; ask something")
    if template is None:
        text = text.strip()
    else:
        try:
            text = filled(template, _columns(text, template_columns(template)))
        except BadRecordError as error:
            raise UserError(f"question: {error}") from None
    return Sample("asked", "asked", "asked", "none", (), 0.0, (_record(text),))


def _columns(text: str, names: list[str]) -> dict[str, Any]:
    if len(names) == 1:
        return {names[0]: text.strip()}
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        example = json.dumps(dict.fromkeys(names, "..."), ensure_ascii=False)
        raise UserError(
            f"question: expected a JSON object with {', '.join(names)}, from which the model's prompt is made, found "
            f"{text[:60]!r}; write it as {example}"
        )
    return values


def _check_text(text: str) -> None:
    if not text.strip():
        raise UserError("question: expected some text, found none; ask something")
    if token := special_token(text):
        raise UserError(f"question: expected plain text, found the special token {token!r}; leave it out")


def _record(question: str) -> Record:
    return Record("asked", composed(question), "", (), "open")


def seen(sample: Sample) -> str:
    """Describe the frames that a model sees of a sample, such as "8 frames of 112 x 112 pixels, 2 a second"."""
    first, *rest = sample.images()
    size = f"{first.width} x {first.height} pixels"
    if sample.media_kind != "video":
        return f"an image of {size}"
    return f"{len(rest) + 1} frames of {size}, {sample.fps:.3g} a second"

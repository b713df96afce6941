"""Make a sample of a question about an image or a video file, sampled and resized as in the data set."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.media import files
from firstsight.readers.problems import BadRecordError
from firstsight.readers.source_record import special_token
from firstsight.records.sample import Record, Sample, composed


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

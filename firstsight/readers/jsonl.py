"""Read records from a JSON Lines file: one question a line, with the image or video it asks about, or one text a line.

    {"media": "clips/kitchen.mp4", "question": "What do I hold?", "answer": "a cup"}
    {"text": "A text for language modelling, which nothing is asked about."}

`media` is the path of an image or a video, or a list of paths of images, which are frames in order; without it the
question is about text alone. Optional keys: `id`, `answers` (all accepted answers), `options` (a list; `answer` is then
a letter or the text of an option), `question_type`, `group` (what must not be in two splits; by default the media
file), `start` and `end` (a window of a video, in seconds), `split` (train, validation or test; by default chosen by
group). With `data.classes` and `data.prompt`, `firstsight.readers.columns` says which keys there are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstsight.core.params import Data
from firstsight.readers.columns import MEDIA_KEYS, ours
from firstsight.readers.media import Files, files
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, Media, SourceRecord, SourceText, source_record
from firstsight.readers.text_files import as_object, media_root, read_lines

# The most seconds of a video: a larger number is an error, and a larger integer may not fit a float.
_LONGEST = 10**9


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions in the order of the lines.

    Raises:
        UserError: the file is missing or not UTF-8.
    """
    path = Path(data.path)
    for number, text in read_lines(path, "a JSON Lines file"):
        place = f"{path}: line {number}"
        with problems.at(place):
            yield asked(place, as_object(text), f"{path.stem}-{number}", data)


def asked(place: str, values: dict[str, Any], default_id: str, data: Data) -> Asked:
    """Return the question in the `values` of one line or row.

    Raises:
        BadRecordError: a key or value is wrong; the message names the first.
    """
    values = ours(values, data)
    rest = {"id": default_id} | {key: value for key, value in values.items() if key not in MEDIA_KEYS}
    record, media = source_record(place, **rest), _media(values, media_root(data))
    check_without_media(record, media)
    return Asked(record, media)


def check_without_media(record: SourceRecord, media: Media | None) -> None:
    """Raise BadRecordError if a text has images or a video."""
    if media is not None and isinstance(record, SourceText):
        raise BadRecordError(
            "expected a text without images and videos, found it with some; leave them out, or ask a question about "
            "them"
        )


def window(start: Any, end: Any) -> tuple[float | None, float | None]:
    """Return `start` and `end` of a window, in seconds, after checking them; None is not given.

    Raises:
        BadRecordError: one is not a number of seconds, or the end is not after the start.
    """
    for name, seconds in (("start", start), ("end", end)):
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 <= seconds < _LONGEST):
            raise BadRecordError(f"{name}: expected seconds, found {repr(seconds)[:60]}; correct it")
    if end is not None and end <= (start or 0):
        raise BadRecordError(
            f"expected a window within the video, found {start or 0:g} to {end:g} s; correct start and end"
        )
    return start, end


def _media(values: dict[str, Any], root: Path) -> Files | None:
    media = values.get("media")
    start, end = window(values.get("start"), values.get("end"))
    if media is None:
        if start or end:
            raise BadRecordError("expected start and end with a video alone, found them without media; remove them")
        return None
    names = [media] if isinstance(media, str) else media
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadRecordError(f"media: expected a path or a list of paths, found {str(media)[:60]!r}; correct it")
    return files(root, media, start, end)

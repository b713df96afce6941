"""QA records from a JSON Lines file: one question a line, with the media it is about.

    {"media": "clips/kitchen.mp4", "question": "What do I hold?", "answer": "a cup"}

`media` is a path: an image, a video, or a list of images that are frames in order; without it the question stands
alone. Optional keys: `id`, `answers` (all accepted), `options` (a list; `answer` is then a letter or an option's
text), `question_type`, `group` (what must not straddle splits; the media by default), `start` and `end` (a window of a
video, in seconds), `split` (train, validation or test; by group otherwise).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firstsight.core.params import Data
from firstsight.sources.media import files
from firstsight.sources.problems import BadRecord, Problems
from firstsight.sources.question import Asked, Question, question
from firstsight.sources.text import media_root, read_text

MEDIA_KEYS = ("media", "start", "end")
KEYS = (*MEDIA_KEYS, *(name for name in Question.model_fields if name != "place"))


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Questions in the order of the lines.

    Raises:
        UserError: the file is missing, or no UTF-8.
    """
    path = Path(data.path)
    # Lines end at \n alone: JSON allows other separators in text.
    for number, text in enumerate(read_text(path, "a JSON Lines file").split("\n"), start=1):
        if text.strip():
            place = f"{path}: line {number}"
            with problems.at(place):
                yield asked(place, parse(text), f"{path.stem}-{number}", media_root(data))


def parse(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"expected a JSON object, found {text[:60]!r} ({str(error)[:80]}); correct it") from None
    if not isinstance(values, dict):
        raise BadRecord(f"expected a JSON object, found {text[:60]!r}; correct it")
    return values


def asked(place: str, values: dict[str, Any], default_id: str, root: Path) -> Asked:
    """The question of one line, or row, with our own names as keys.

    Raises:
        BadRecord: names the first wrong key or value.
    """
    if unknown := [key for key in values if key not in KEYS]:
        raise BadRecord(f"expected one of {sorted(KEYS)}, found the key {unknown[0][:60]!r}; rename or remove it")
    rest = {"id": default_id} | {key: value for key, value in values.items() if key not in MEDIA_KEYS}
    return Asked(question(place, **rest), _media(values, root))


def _media(values: dict[str, Any], root: Path):
    media, start, end = (values.get(key) for key in MEDIA_KEYS)
    for name, seconds in (("start", start), ("end", end)):
        if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0):
            raise BadRecord(f"{name}: expected seconds, found {seconds!r}; correct it")
    if media is None:
        if start or end:
            raise BadRecord("expected start and end with a video alone, found them without media; remove them")
        return None
    names = [media] if isinstance(media, str) else media
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadRecord(f"media: expected a path or a list of paths, found {str(media)[:60]!r}; correct it")
    return files(root, media, start, end)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")

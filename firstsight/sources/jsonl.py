"""QA records from a JSON Lines file: one question a line, with the media it is about.

    {"media": "clips/kitchen.mp4", "question": "What do I hold?", "answer": "a cup"}

`media` is a path (relative to the file): an image, a video, or a list of images that are frames in order; without it
the question stands alone. Optional keys: `id`, `answers` (all accepted), `options` (a list; `answer` is then a letter
or an option's text), `question_type`, `group` (what must not straddle splits; the media by default), `start` and
`end` (a window of a video, in seconds), `split` (train, validation or test; by group otherwise).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.data.records import LETTERS, Record, Sample
from firstsight.sources.media import VIDEO_SUFFIXES, read_image, read_video

Text = Annotated[str, Field(min_length=1)]


class Line(BaseModel):
    """One line of the file, validated."""

    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)

    question: Text
    answer: Text
    media: Text | list[Text] | None = None
    id: Text | None = None
    answers: list[Text] = []
    options: Annotated[list[Text], Field(max_length=len(LETTERS))] = []
    question_type: Text = "open"
    group: Text | None = None
    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(gt=0)] | None = None
    split: Literal["train", "validation", "test"] | None = None

    def media_key(self) -> tuple[Any, ...]:
        """What makes two lines ask about the same media. A question without media is its own."""
        if self.media is None:
            return ("none", self.question)
        paths = (self.media,) if isinstance(self.media, str) else tuple(self.media)
        return (*paths, self.start, self.end)


def read(data: Data) -> Iterator[tuple[Sample, str | None]]:
    """Samples in the order of their first line, each with the split the file gives it (None: by group).

    Every line is checked, and every media file looked for, before the first is decoded.

    Raises:
        UserError: names the line and what is wrong with it.
    """
    path = Path(data.path)
    lines = _parse(path)
    by_media: dict[tuple[Any, ...], list[tuple[int, Line]]] = {}
    for number, line in lines:
        by_media.setdefault(line.media_key(), []).append((number, line))
    for same_media in by_media.values():
        _check_media(path, same_media)
    for same_media in by_media.values():
        yield _sample(path, same_media, data), same_media[0][1].split


def _parse(path: Path) -> list[tuple[int, Line]]:
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.path: expected a JSON Lines file in UTF-8, found {path} ({error}); correct the path"
        ) from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append((number, Line.model_validate(json.loads(text))))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: line {number}: expected a JSON object, found {text[:60]!r} ({error.msg})"
            ) from None
        except ValidationError as error:
            raise UserError(f"{path}: line {number}: {_describe(error)}") from None
    if not lines:
        raise UserError(f"{path}: expected records, found an empty file; one JSON object a line")
    return lines


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"expected a value for {key!r}, found none; add it, or remove the line"
    if first["type"] == "extra_forbidden":
        return f"expected one of {sorted(Line.model_fields)}, found the key {key!r}; rename or remove it"
    if first["type"] == "string_too_short":
        return f"expected text for {key!r}, found an empty one; fill it, or remove the line"
    if not key:
        return f"expected a JSON object, found {first['input']!r}"
    return f"{key}: {first['msg'].lower()}, found {first['input']!r}"


def _check_media(path: Path, same_media: list[tuple[int, Line]]) -> None:
    """Media files exist, and lines about one media agree on its split and group."""
    number, first = same_media[0]
    for media in [first.media] if isinstance(first.media, str) else first.media or []:
        if not (path.parent / media).is_file():
            raise UserError(
                f"{path}: line {number}: expected a media file, found no {path.parent / media}; "
                "correct the path (it is relative to the .jsonl file), or remove the line"
            )
    for other, line in same_media[1:]:
        for name in ("split", "group"):
            if getattr(line, name) != getattr(first, name):
                raise UserError(
                    f"{path}: line {other}: expected the same {name} for the same media as on line {number} "
                    f"({getattr(first, name)!r}), found {getattr(line, name)!r}; make them agree"
                )


def _sample(path: Path, same_media: list[tuple[int, Line]], data: Data) -> Sample:
    number, first = same_media[0]
    place = f"{path}: line {number}"
    frames, fps = (), 0.0
    if isinstance(first.media, list):
        kind, frames = "frames", tuple(read_image(path.parent / name, data, place) for name in first.media)
    elif first.media is None:
        kind = "none"
    elif Path(first.media).suffix.lower() in VIDEO_SUFFIXES:
        kind = "video"
        frames, fps = read_video(path.parent / first.media, data, first.start, first.end, place)
    else:
        kind, frames = "image", (read_image(path.parent / first.media, data, place),)
    name = "|".join(map(str, first.media_key()))
    media = "|".join([first.media] if isinstance(first.media, str) else first.media or [first.question])
    return Sample(
        id=name,
        group=first.group or media,
        source=path.name,
        media_kind=kind,
        frames=frames,
        fps=fps,
        records=tuple(_record(path, number, line) for number, line in same_media),
    )


def _record(path: Path, number: int, line: Line) -> Record:
    answer = line.answer
    if line.options:
        answer = _letter(path, number, line)
    return Record(
        id=line.id or f"{path.stem}-{number}",
        question=line.question,
        answer=answer,
        answers=tuple(dict.fromkeys([answer, *line.answers])),
        question_type=line.question_type,
        options=tuple(line.options),
    )


def _letter(path: Path, number: int, line: Line) -> str:
    """The letter of the right option, whether the file gives the letter or the option's text."""
    letters = LETTERS[: len(line.options)]
    if line.answer in line.options:
        return letters[line.options.index(line.answer)]
    if len(line.answer) == 1 and line.answer in letters:
        return line.answer
    raise UserError(
        f"{path}: line {number}: expected the answer to be a letter of {letters!r} or an option's text, "
        f"found {line.answer!r}; correct it"
    )

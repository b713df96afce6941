"""QA records from a JSON Lines file: one question a line, with the media it is about.

    {"media": "clips/kitchen.mp4", "question": "What do I hold?", "answer": "a cup"}

`media` is a path (relative to the file): an image, a video, or a list of images that are frames in order; without it
the question stands alone. Optional keys: `id`, `answers` (all accepted), `options` (a list; `answer` is then a letter
or an option's text), `question_type`, `group` (what must not straddle splits; the media by default), `start` and
`end` (a window of a video, in seconds), `split` (train, validation or test; by group otherwise).

Lines that share a media file are of one group, and so of one split, unless they name groups of their own.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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
    media: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    id: Text | None = None
    answers: list[Text] = []
    options: Annotated[list[Text], Field(max_length=len(LETTERS))] = []
    question_type: Text = "open"
    group: Text | None = None
    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(gt=0)] | None = None
    split: Literal["train", "validation", "test"] | None = None

    @field_validator("question", "answer", "answers", "options")
    @classmethod
    def _plain_text(cls, value: str | list[str]) -> str | list[str]:
        # A model reads <|im_end|> or <|image_pad|> as what it means in its chat template, not as text.
        for text in [value] if isinstance(value, str) else value:
            if token := re.search(r"<\|\w+\|>", text):
                raise ValueError(f"expected plain text, found the special token {token[0]!r}")
        return value

    @model_validator(mode="after")
    def _window_of_a_video(self) -> "Line":
        if (self.start or self.end) and not self.is_video():
            raise ValueError(f"expected start and end with a video alone, found them with media {self.media!r}")
        return self

    def files(self) -> tuple[str, ...]:
        """The media files, as paths that differ when the files do."""
        names = [self.media] if isinstance(self.media, str) else self.media or []
        return tuple(posixpath.normpath(name) for name in names)

    def is_video(self) -> bool:
        return isinstance(self.media, str) and Path(self.media).suffix.lower() in VIDEO_SUFFIXES

    def media_key(self) -> tuple[Any, ...]:
        """What makes two lines ask about the same media. A question without media is its own."""
        return (*self.files(), self.start, self.end) if self.media else ("none", self.question)


def read(data: Data) -> Iterator[tuple[Sample, str | None]]:
    """Samples in the order of their first line, each with the split the file gives it (None: by group).

    Every line is checked, and every media file looked for, before the first is decoded.

    Raises:
        UserError: names the line and what is wrong with it.
    """
    path = Path(data.path)
    lines = _parse(path)
    _check_media_exists(path, lines)
    groups = _groups(lines)
    _check_agreement(path, lines, groups)
    by_media: dict[tuple[Any, ...], list[tuple[int, Line]]] = {}
    for number, line in lines:
        by_media.setdefault(line.media_key(), []).append((number, line))
    for same_media in by_media.values():
        number, first = same_media[0]
        yield _sample(path, same_media, groups[number], data), first.split


def _parse(path: Path) -> list[tuple[int, Line]]:
    try:
        # Some editors begin a file with a byte-order mark. Lines end at \n alone: JSON allows other separators in text.
        texts = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.path: expected a JSON Lines file in UTF-8, found {path} ({error}); correct the path"
        ) from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append((number, Line.model_validate(json.loads(text))))
        except ValidationError as error:
            raise UserError(f"{path}: line {number}: {_describe(error)}; correct it") from None
        except (ValueError, RecursionError) as error:
            found = f"{text[:60]!r} ({str(error)[:80]})"
            raise UserError(f"{path}: line {number}: expected a JSON object, found {found}; correct it") from None
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
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}".removeprefix(": ")
    if not key:
        return f"expected a JSON object, found {first['input']!r}"
    return f"{key}: {first['msg'].lower()}, found {first['input']!r}"


def _check_media_exists(path: Path, lines: list[tuple[int, Line]]) -> None:
    for number, line in lines:
        for name in line.files():
            try:
                found = (path.parent / name).is_file()
            except (OSError, ValueError):
                found = False
            if not found:
                raise UserError(
                    f"{path}: line {number}: expected a media file, found no {path.parent / name}; "
                    "correct the path (it is relative to the .jsonl file), or remove the line"
                )


def _groups(lines: list[tuple[int, Line]]) -> dict[int, str]:
    """The group of every line, by its number: the one it names, else its media files and all they are seen with."""
    leader: dict[str, str] = {}

    def find(file: str) -> str:
        while leader.setdefault(file, file) != file:
            file = leader[file]
        return file

    for _, line in lines:
        for file in line.files()[1:]:
            # The lesser name leads, whatever the order of the lines.
            first, second = sorted((find(line.files()[0]), find(file)))
            leader[second] = first
    return {number: line.group or (find(line.files()[0]) if line.files() else line.question) for number, line in lines}


def _check_agreement(path: Path, lines: list[tuple[int, Line]], groups: dict[int, str]) -> None:
    """Lines of one group agree on their split, lines about one media on their group, and no two share an id."""
    split_of: dict[str, tuple[int, str | None]] = {}
    group_of: dict[tuple[Any, ...], tuple[int, str]] = {}
    line_of: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        name = line.id or _default_id(path, number)
        for known, key, value, what in (
            (group_of, line.media_key(), groups[number], "group for the same media"),
            (split_of, groups[number], line.split, "split for the same group"),
            (line_of, name, f"line {number}", "line for the same id"),
        ):
            other, expected = known.setdefault(key, (number, value))
            if expected != value:
                raise UserError(
                    f"{path}: line {number}: expected the same {what} as on line {other} ({expected!r}), "
                    f"found {value!r}; make them agree, or tell them apart"
                )


def _sample(path: Path, same_media: list[tuple[int, Line]], group: str, data: Data) -> Sample:
    number, first = same_media[0]
    place = f"{path}: line {number}"
    files = [path.parent / name for name in first.files()]
    frames, fps = (), 0.0
    if first.is_video():
        kind = "video"
        frames, fps = read_video(files[0], data, first.start, first.end, place)
    elif first.media is None:
        kind = "none"
    else:
        kind = "frames" if isinstance(first.media, list) else "image"
        frames = tuple(read_image(file, data, place) for file in files)
    return Sample(
        id="|".join(map(str, first.media_key())),
        group=group,
        source=path.name,
        media_kind=kind,
        frames=frames,
        fps=fps,
        records=tuple(_record(path, number, line) for number, line in same_media),
    )


def _default_id(path: Path, number: int) -> str:
    return f"{path.stem}-{number}"


def _record(path: Path, number: int, line: Line) -> Record:
    answers = [line.answer, *line.answers]
    if line.options:
        answers = [_letter(path, number, line.options, answer) for answer in answers]
    return Record(
        id=line.id or _default_id(path, number),
        question=line.question,
        answer=answers[0],
        answers=tuple(dict.fromkeys(answers)),
        question_type=line.question_type,
        options=tuple(line.options),
    )


def _letter(path: Path, number: int, options: list[str], answer: str) -> str:
    """The letter of the right option, whether the file gives the letter or the option's text."""
    letters = LETTERS[: len(options)]
    if answer in options:
        return letters[options.index(answer)]
    if len(answer) == 1 and answer in letters:
        return answer
    raise UserError(
        f"{path}: line {number}: expected the answer to be a letter of {letters!r} or an option's text, "
        f"found {answer!r}; correct it"
    )

"""Read data sets of the Hugging Face hub, or local copies, that `datasets` loads without running their authors' code.

`data.hub.fields` maps each of our fields (`FIELDS`) to the data set's column. An answer may be an index into the
options, from 0. A class (datasets' ClassLabel) is its name; -1, by which data sets mark an unknown class, is no value.
An image is a value of datasets' Image type, or a path; a video is a path. Paths are relative to the
media root, and a video without a suffix is taken as .mp4. `data.prompt` is filled with the data set's own columns.
Texts are read as the lines of a text file are (`firstsight.readers.plain_text`), because data sets such as WikiText
have a row for each line. `data.hub.splits` maps each of the data set's splits to one of ours, or leaves the choice to
the groups; a column mapped to our `split` takes precedence.
"""

import functools
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from firstsight.core.errors import UserError
from firstsight.core.params import Data, Hub
from firstsight.core.progress import on_terminal
from firstsight.core.stage import log
from firstsight.readers.choices import chosen, plain_options
from firstsight.readers.columns import columns_of, filled
from firstsight.readers.image_decoding import read_image
from firstsight.readers.jsonl import check_without_media, window
from firstsight.readers.media import Files, files
from firstsight.readers.plain_text import Paragraphs
from firstsight.readers.problems import BadRecordError, Problems, reason
from firstsight.readers.source_record import (
    MEDIA_PLACEHOLDER,
    PLACEHOLDER,
    Asked,
    DecodedMedia,
    Media,
    source_record,
)
from firstsight.readers.suffixes import VIDEO_SUFFIXES
from firstsight.readers.text_files import media_root
from firstsight.records.sample import LETTERS, MediaKind

TEXTS = ("id", "question", "text", "question_type", "group", "split")
CHOICES = ("answer", "answers", "options", "class")
MEDIA = ("image", "images", "video")
FIELDS = (*TEXTS, *CHOICES, *MEDIA, "start", "end")
_PLACEHOLDERS = re.compile(rf"^(?:\s*{PLACEHOLDER})+\s*")


@dataclass(frozen=True)
class Source:
    """Name a split of a data set at one commit; `commit` is None for a local folder."""

    id: str
    config: str | None
    split: str
    commit: str | None


@dataclass(frozen=True)
class Embedded:
    """Name images stored in a row of a data set by their SHA-256: equal images have equal keys in all rows."""

    source: Source
    row: int
    column: str
    digests: tuple[str, ...]
    kind: MediaKind

    def key(self) -> str:
        return "|".join(self.digests)

    def group(self) -> tuple[str, ...]:
        return self.digests

    def titles(self) -> tuple[str, ...]:
        return ()

    def origins(self) -> tuple[str, ...]:
        return self.group()

    def stamp(self) -> object:
        return None  # the key is a hash of the content

    def load(self, data: Data) -> DecodedMedia:
        value = _open(self.source)[self.row].column(self.column)[0].as_py()
        name = f"{self.source.split}[{self.row}].{self.column}"
        return DecodedMedia(tuple(read_image(BytesIO(one["bytes"]), data, name) for one in _listed(value)))


def read(data: Data, problems: Problems) -> Iterator[Asked]:
    """Yield the questions of each split in `data.hub.splits`, in the order of the rows.

    Raises:
        UserError: the data set cannot be loaded, or a column or a split is missing.
    """
    hub = data.hub
    if unknown := [name for name in hub.fields if name not in FIELDS]:
        raise UserError(f"data.hub.fields: expected names of {FIELDS}, found {unknown[0]!r}; correct it")
    if not ({"question", "text"} & set(hub.fields) or data.prompt) or not hub.splits:
        raise UserError(
            "data.hub: expected a column for 'question' or 'text' under fields and a split under splits, found none"
        )
    if data.classes and {"class", *CHOICES} & set(hub.fields) != {"class"}:
        raise UserError(
            "data.hub.fields: expected a column for 'class' in place of answers and options, because there are "
            f"classes, found {sorted(hub.fields)}; correct it"
        )
    found = commit(hub)
    if found:
        log.info("%s: commit %s", hub.id, found)
    for theirs, ours in hub.splits.items():
        yield from _split(
            Source(hub.id, hub.config, theirs, found), None if ours == "by group" else ours, data, problems
        )


def class_names(hub: Hub) -> list[str] | None:
    """Return the names of the classes of the column that is mapped to `class`; None if it is no ClassLabel, or absent.

    Raises:
        UserError: the data set cannot be loaded.
    """
    if (column := hub.fields.get("class")) is None or not hub.splits:
        return None
    first = Source(hub.id, hub.config, next(iter(hub.splits)), commit(hub))
    return getattr(_open(first).features.get(column), "names", None)


def commit(hub: Hub) -> str | None:
    """Return the commit that `hub.revision` names, resolved once per process; None for a local folder.

    Raises:
        UserError: the data set or revision does not exist, or the hub does not answer and its cache has no commit.
    """
    return None if Path(hub.id).is_dir() else _commit(hub.id, hub.revision)


def layout(hub: Hub) -> tuple[list[str], dict[str, Any]]:
    """Return the names of a data set's splits, and by name the types of the columns of the first, which is downloaded.

    The types are features of datasets.

    Raises:
        UserError: the data set cannot be loaded.
    """
    import datasets  # imported here, as in `_open`

    found = commit(hub)
    with _one_line(hub.id):
        splits = datasets.get_dataset_split_names(hub.id, hub.config, revision=found)
    return splits, dict(_open(Source(hub.id, hub.config, splits[0], found)).features)


@functools.cache
def _commit(repository: str, revision: str | None) -> str:
    from huggingface_hub import HfApi  # imported here, as below: no other source needs the hub's client

    with _one_line(repository):
        return HfApi().resolve_revision(repository, repo_type="dataset", revision=revision).resolved


@functools.lru_cache(maxsize=8)
def _open(source: Source) -> Any:
    """Return the split as a `datasets.Dataset` whose rows are Arrow tables, so that images stay encoded as stored."""
    import datasets  # imported here: it takes a second or two, and no other source needs it

    if not on_terminal():
        datasets.disable_progress_bars()
    with _one_line(source.id):
        found = datasets.load_dataset(source.id, source.config, split=source.split, revision=source.commit)
    return found.with_format("arrow")


@contextmanager
def _one_line(repository: str) -> Iterator[None]:
    """Turn any error of the hub's client or `datasets` into a UserError of one line with the remedy."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except GatedRepoError:
        remedy = f"expected access to a gated data set, found none; accept its terms at hf.co/datasets/{repository} "
        remedy += "and set HF_TOKEN to a token of that account"
    except RepositoryNotFoundError:
        remedy = "expected a data set of the hub or a local folder, found neither; correct data.hub.id, or set "
        remedy += "HF_TOKEN if it is private"
    except RevisionNotFoundError:
        remedy = "expected the revision in data.hub.revision, found none of that name; correct it"
    except Exception as error:
        # datasets passes on any exception of the file format's reader.
        remedy = (
            f"expected a data set, found {reason(error)[:200]}; correct data.hub, or check the network and run it again"
        )
    else:
        return
    raise UserError(f"{repository}: {remedy}") from None


def _split(source: Source, split: str | None, data: Data, problems: Problems) -> Iterator[Asked]:
    fields, rows = data.hub.fields, _open(source)
    prompted = columns_of(data) if data.prompt else []
    wanted = list(dict.fromkeys([*fields.values(), *prompted]))
    if missing := [column for column in wanted if column not in rows.column_names]:
        place = "data.hub" if missing[0] in fields.values() else "data.prompt"
        raise UserError(f"{source.id}: expected the column {missing[0]!r}, found {rows.column_names}; correct {place}")
    row, paragraphs = 0, Paragraphs(problems)
    for batch in rows.select_columns(wanted).iter(batch_size=16):
        for values in batch.to_pylist():
            place = f"{source.id}: {source.split}[{row}]"
            with problems.at(place):
                has_options = bool(values.get(fields.get("options")))
                named = {
                    ours: _named(ours, values[theirs], rows.features[theirs], has_options)
                    for ours, theirs in fields.items()
                }
                if data.prompt is not None:
                    texts = {name: _named(name, values[name], rows.features[name], False) for name in prompted}
                    named["question"] = filled(data.prompt, texts)
                named["answer"] = named.pop("class", named.get("answer"))
                text = named.get("text")
                if not isinstance(text, str) or paragraphs.is_one(text):
                    yield _asked(place, source, row, {"group": paragraphs.title} | named, split, data)
            row += 1


def _named(ours: str, value: Any, feature: Any, has_options: bool) -> Any:
    """Return the value of one of our fields with the names of classes, also in lists, in place of their numbers.

    Where there are options, the numbers of classes that are called A, B, C or 0, 1, 2 are indices into them.

    Raises:
        BadRecordError: there is no class of that number.
    """
    if isinstance(value, list):
        return [_named(ours, one, getattr(feature, "feature", None), has_options) for one in value]
    if (names := getattr(feature, "names", None)) is None:
        return value
    if value is None or value == -1:
        return None
    if not 0 <= value < len(names):
        raise BadRecordError(f"{ours}: expected a class from 0 to {len(names) - 1}, found {value}; correct it")
    counted = (list(LETTERS[: len(names)]), [str(number) for number in range(len(names))])
    is_index = has_options and ours in ("answer", "answers") and [name.upper() for name in names] in counted
    return value if is_index else names[value]


def _asked(place: str, source: Source, row: int, values: dict[str, Any], split: str | None, data: Data) -> Asked:
    texts = {name: _text(values.get(name)) for name in TEXTS}
    if isinstance(texts["question"], str):
        _check_placeholders(texts["question"], values)
        texts["question"] = _PLACEHOLDERS.sub("", texts["question"])
    options = values.get("options") or []
    if not isinstance(options, list):
        raise BadRecordError(f"options: expected a list, found {str(options)[:60]!r}; correct it")
    answers = values.get("answers") or []
    asked = source_record(
        place,
        **texts | {"id": texts["id"] or f"{source.split}-{row}", "split": texts["split"] or split},
        options=plain_options(options),
        answer=_text(chosen(values.get("answer"), options)),
        answers=[_text(chosen(one, options)) for one in answers] if isinstance(answers, list) else answers,
    )
    media = _media(source, row, values, data)
    check_without_media(asked, media)
    return Asked(asked, media)


def _check_placeholders(question: str, values: dict[str, Any]) -> None:
    """Raise BadRecordError if the placeholders that a question begins with are not as many as the row's media."""
    begins = _PLACEHOLDERS.match(question)
    found = re.findall(MEDIA_PLACEHOLDER, begins[0]) if begins else []
    images = [one for name in ("image", "images") if (value := values.get(name)) for one in _listed(value)]
    count = len(images) + bool(values.get("video"))
    # One <video> may stand for several images, its frames.
    if found and len(found) != count and not (images and found == ["<video>"]):
        raise BadRecordError(
            f"expected an image or video for each <image> and <video> of the question, found {len(found)} of these and "
            f"{count} media; map the column of the media to one of {MEDIA} in data.hub.fields, or correct the row"
        )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> Any:
    """Return an integer as text, because ids and counts are often integer columns; any other value unchanged."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _media(source: Source, row: int, values: dict[str, Any], data: Data) -> Media | None:
    given = [name for name in MEDIA if values.get(name)]
    start, end = window(values.get("start"), values.get("end"))
    if (start or end) and given != ["video"]:
        raise BadRecordError(
            f"expected start and end with a video alone, found them with {' and '.join(given) or 'no media'}; "
            "leave them out of data.hub.fields"
        )
    if not given:
        return None
    if len(given) > 1:
        raise BadRecordError(f"expected one of {MEDIA}, found {' and '.join(given)}; leave one out of data.hub.fields")
    name, value = given[0], values[given[0]]
    parts = _listed(value)
    if name != "video" and all(isinstance(one, dict) and one.get("bytes") for one in parts):
        digests = tuple(hashlib.sha256(one["bytes"]).hexdigest() for one in parts)
        kind = "frames" if isinstance(value, list) else "image"
        return Embedded(source, row, data.hub.fields[name], digests, kind)
    return _files(source, name, value, start, end, data)


def _files(source: Source, name: str, value: Any, start: float | None, end: float | None, data: Data) -> Files:
    """Return the media that a row names by path, in the media root or in the folder where datasets stores its files."""
    parts = _listed(value)
    root = media_root(data)
    if all(isinstance(one, dict) and one.get("path") for one in parts):
        root = Path(source.id if source.commit is None else constants.HF_HUB_CACHE).absolute()
        parts = [one["path"] for one in parts]
    if not all(isinstance(one, str) for one in parts):
        raise BadRecordError(f"{name}: expected an image or a path, found {str(value)[:60]!r}; correct data.hub.fields")
    if name == "video" and Path(parts[0]).suffix.lower() not in VIDEO_SUFFIXES:
        parts = [f"{parts[0]}.mp4"]
    return files(root, parts if isinstance(value, list) else parts[0], start, end)

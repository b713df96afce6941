"""Look at data before anything is written: read every record by the source's own reader, and show a few of them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice

from firstsight.assembly.assemble import Unit, assemble
from firstsight.assembly.sources import READERS
from firstsight.core.classes import classes_apart
from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers import hub_dataset
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, DecodedMedia
from firstsight.records.sample import SPLITS, Sample, Text

SHOWN = 3
# A language model reads the names of all classes behind each question: more are rather a column of free text.
MOST_CLASSES = 200


@dataclass(frozen=True)
class Shown:
    """Hold a record as the pipeline will read it: its split, its image or video in words, the prompt, the answer.

    A text has no prompt, and is the answer.
    """

    split: str
    media: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Found:
    """Hold what was found in data.

    `counts` are the records of each split, `left_out` what is in none, by reason. `texts` are the samples where all are
    about text alone. `classes` are the names of the classes, none where records have no class.
    """

    counts: dict[str, int]
    unanswered: int
    left_out: dict[str, int]
    has_media: bool
    shown: tuple[Shown, ...]
    texts: tuple[Sample, ...]
    classes: tuple[str, ...]


def read(data: Data, problems: Problems) -> list[Asked]:
    """Return every record of the source; media are named and not decoded. What is left out is counted in `problems`.

    Raises:
        UserError: the source or one of its records cannot be read.
    """
    return list(READERS[data.source](data, problems))


def read_classes(name: str, data: Data, problems: Problems) -> tuple[list[Asked], tuple[str, ...]]:
    """Return every record of the source, each of a class, and the names of all classes that they have.

    The names are those of the hub's ClassLabel, in its order, or else those that the records have, sorted.

    Raises:
        UserError: as `read` raises; or there is one class alone, more than `MOST_CLASSES`, or two of the same wording.
    """
    named = hub_dataset.class_names(data.hub) if data.source == "hub" else None
    # Readers take the column `class` where there are classes, whatever these are called.
    asked = read(data.model_copy(update={"classes": named or ["class"]}), problems)
    found = sorted({answer for one in asked for answer in one.record.accepted()})
    for names in filter(None, (found, named)):
        if len(names) > MOST_CLASSES:
            raise UserError(
                f"{name}: expected at most {MOST_CLASSES} classes, found {len(names):,} ({', '.join(names[:3])[:60]}, "
                "...); take another column for the class, or list them under data.classes in params.yaml"
            )
    try:
        classes_apart(found)
        return asked, tuple(classes_apart(named or found))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def look(name: str, asked: list[Asked], data: Data, problems: Problems) -> Found:
    """Split the records as the stage build-egoqa-dataset does, and decode the media of those that are shown.

    Args:
        name: what errors call the data.
        data: the settings of the split and of the decoding; its limits and labels are disregarded.
        problems: counts what reading has left out.

    Raises:
        UserError: a record or a shown image or video cannot be used, or a split is empty.
    """
    limits = {f"{split}_samples": None for split in SPLITS}
    whole = data.model_copy(update={**limits, "unanswered": "teacher", "labelled_fraction": 1.0})
    units = assemble([(name, asked)], whole, problems, problems.left_out)
    counts = {split: sum(len(unit.questions) for unit in units if unit.split == split) for split in SPLITS}
    if empty := [split for split in SPLITS if not counts[split]]:
        found = ", ".join(f"{split} {count:,}" for split, count in counts.items())
        # A plain text file has no place for it.
        own = "" if data.source == "text" else ", or give records a split of their own"
        raise UserError(
            f"{name}: expected records in every split, found none in {', '.join(empty)} ({found}), because all of a "
            f"group, such as an article of a text file, is in one split; add records{own}"
        )
    has_media = any(unit.media for unit in units)
    return Found(
        counts=counts,
        unanswered=sum(not one.accepted() for unit in units for one in unit.questions),
        left_out=dict(problems.left_out),
        has_media=has_media,
        shown=tuple(islice(_shown(units, data, problems), SHOWN)),
        texts=() if has_media else tuple(_sample(unit, DecodedMedia()) for unit in units),
        classes=tuple(data.classes or ()),
    )


def cut(found: Found, max_tokens: int) -> Found:
    """Return what was found, where all are texts, with texts that are cut to so many tokens."""
    texts = (
        replace(one, records=tuple(Text(**asdict(record) | {"max_tokens": max_tokens}) for record in one.records))
        for one in found.texts
    )
    return replace(found, texts=tuple(texts))


def _shown(units: list[Unit], data: Data, problems: Problems) -> Iterator[Shown]:
    """Yield the first record about each image or video, and each record about text alone."""
    for unit in units:
        with problems.at(unit.questions[0].place):
            sample = _sample(unit, unit.media.load(data) if unit.media else DecodedMedia())
            first = sample.records[0]
            yield Shown(unit.split, seen(sample), first.prompt(), first.answer)


def _sample(unit: Unit, decoded: DecodedMedia) -> Sample:
    kind = unit.media.kind if unit.media else "none"
    return Sample(unit.key, unit.group, unit.source, kind, decoded.frames, decoded.fps, unit.records())


def seen(sample: Sample) -> str:
    """Describe what a model sees of a sample: "text", "image, 112 x 84" or "video, 8 frames of 112 x 84"."""
    if not sample.frames:
        return "text"
    first, *rest = sample.images()
    size = f"{first.width} x {first.height}"
    return f"image, {size}" if not rest else f"{sample.media_kind}, {len(rest) + 1} frames of {size}"

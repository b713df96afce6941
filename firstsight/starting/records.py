"""Look at data before anything is written: read every record by the source's own reader, and show a few of them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from firstsight.assembly.assemble import Unit, assemble
from firstsight.assembly.sources import READERS
from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.problems import Problems
from firstsight.readers.source_record import Asked, DecodedMedia
from firstsight.records.sample import SPLITS, Sample

SHOWN = 3


@dataclass(frozen=True)
class Shown:
    """Hold a record as the pipeline will read it: its split, its image or video in words, the prompt, the answer."""

    split: str
    media: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Found:
    """Hold what was found in data.

    `counts` are the records of each split, `left_out` those in none, by reason. `texts` are the samples where all are
    about text alone.
    """

    counts: dict[str, int]
    unanswered: int
    left_out: dict[str, int]
    has_media: bool
    shown: tuple[Shown, ...]
    texts: tuple[Sample, ...]


def read(data: Data) -> list[Asked]:
    """Return every question of the source; media are named and not decoded.

    Raises:
        UserError: the source or one of its records cannot be read.
    """
    return list(READERS[data.source](data, Problems("stop")))


def look(name: str, asked: list[Asked], data: Data) -> Found:
    """Split the questions as the stage build-egoqa-dataset does, and decode the media of those that are shown.

    Args:
        name: what errors call the data.
        data: the settings of the split and of the decoding; its limits and labels are disregarded.

    Raises:
        UserError: a record or a shown image or video cannot be used, or a split is empty.
    """
    limits = {f"{split}_samples": None for split in SPLITS}
    whole = data.model_copy(update={**limits, "unanswered": "teacher", "labelled_fraction": 1.0})
    dropped: Counter[str] = Counter()
    problems = Problems("stop")
    units = assemble([(name, asked)], whole, problems, dropped)
    counts = {split: sum(len(unit.questions) for unit in units if unit.split == split) for split in SPLITS}
    if empty := [split for split in SPLITS if not counts[split]]:
        raise UserError(
            f"{name}: expected records in every split, found none in {', '.join(empty)} (of {counts}); add records, or "
            "give records a split of their own"
        )
    has_media = any(unit.media for unit in units)
    return Found(
        counts=counts,
        unanswered=sum(not one.accepted() for unit in units for one in unit.questions),
        left_out=dict(dropped),
        has_media=has_media,
        shown=tuple(islice(_shown(units, data, problems), SHOWN)),
        texts=() if has_media else tuple(_sample(unit, DecodedMedia()) for unit in units),
    )


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

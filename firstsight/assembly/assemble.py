"""From questions to samples-to-be: media with all that is asked about them, each in a split, before any is decoded."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from firstsight.assembly.splits import HELD_BACK, SplitName, split_of, stratified
from firstsight.core.params import Data
from firstsight.readers.overlap import video_ids
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, Media, SourceRecord
from firstsight.records.sample import Record


@dataclass(frozen=True)
class Unit:
    """One media (None: none) and the questions about it. `key` is unique and becomes the sample's id."""

    key: str
    source: str
    media: Media | None
    group: str
    split: SplitName
    questions: tuple[SourceRecord, ...]

    def records(self) -> tuple[Record, ...]:
        return tuple(one.to_record() for one in self.questions)


def assemble(
    sources: Iterable[tuple[str, Iterable[Asked]]], data: Data, problems: Problems, dropped: Counter[str]
) -> list[Unit]:
    """Units in the order of their first question; what is left out is counted in `dropped`, by reason.

    Left out are questions for another split than their group's, repeated ones, what is asked in training about media of
    the benchmark, questions of `data.train_only_types` in the test split, and what exceeds `data.*_samples`. Problems
    are ids that two questions have, questions about one media that disagree on its group, and questions without an
    answer.

    Args:
        sources: by name, the questions of each; what the second and later ones ask is the benchmark.
    """
    asked = [(name, one) for name, questions in sources for one in questions]
    asked = _answerable(asked, data, problems)
    groups = _groups(asked)
    asked = _agreeing(asked, groups, problems)
    splits = _splits(asked, groups, data)
    by_media: dict[tuple[str, str], list[Asked]] = {}
    for name, one in asked:
        if one.record.split in (None, splits[name, groups[one.record.id]]):
            by_media.setdefault((name, media_key(one)), []).append(one)
        else:
            dropped["group of another split"] += 1
    units = []
    for (name, key), same_media in by_media.items():
        group = groups[same_media[0].record.id]
        questions = _without_repetition([one.record for one in same_media], dropped)
        units.append(Unit(f"{name}:{key}", name, same_media[0].media, group, splits[name, group], questions))
    return _limited(_without_overlap(units, dropped), data, dropped)


def media_key(one: Asked) -> str:
    """What makes two questions be about the same media. One without media is alone with itself."""
    return one.media.key() if one.media else f"text {one.record.id}"


def repeated(asked: Iterable[tuple[Hashable, SourceRecord]], dropped: Counter[str]) -> set[str]:
    """Ids of questions that were asked before about the same; two that differ in their options are two.

    Args:
        asked: what each is about, and the question; the first of several stays.
        dropped: they are counted here, apart where their answer is another.
    """
    first: dict[tuple[Hashable, str, tuple[str, ...]], SourceRecord] = {}
    again = set()
    for about, one in asked:
        before = first.setdefault((about, one.question, one.options), one)
        if before is not one:
            again.add(one.id)
            same = set(one.accepted()) <= set(before.accepted())
            dropped["duplicate" if same else "another answer to the same question"] += 1
    return again


def _answerable(asked: list[tuple[str, Asked]], data: Data, problems: Problems) -> list[tuple[str, Asked]]:
    """The questions with an id of their own and an answer, or whose answer the teacher is to give."""
    places, kept = {}, []
    for name, one in asked:
        record = one.record
        with problems.at(record.place):
            if (other := places.setdefault(record.id, record.place)) != record.place:
                raise BadRecordError(
                    f"expected an id of its own, found {record.id[:80]!r} again, as at {other}; "
                    "rename one (a record without an id is called by its line)"
                )
            if not record.accepted() and data.unanswered == "refuse":
                raise BadRecordError(
                    "expected an answer, found none; add it, or remove the record, or set data.unanswered to teacher"
                )
            kept.append((name, one))
    return kept


def _groups(asked: list[tuple[str, Asked]]) -> dict[str, str]:
    """The group of every question, by its id: the one it names, else what its media show and all they are seen with."""
    leader: dict[tuple[str, str], tuple[str, str]] = {}

    def find(part: tuple[str, str]) -> tuple[str, str]:
        while leader.setdefault(part, part) != part:
            leader[part] = leader[leader[part]]
            part = leader[part]
        return part

    for name, one in asked:
        parts = [(name, part) for part in one.media.group()] if one.media else []
        for part in parts[1:]:
            # The lesser name leads, whatever the order of the questions.
            first, second = sorted((find(parts[0]), find(part)))
            leader[second] = first
    return {
        one.record.id: one.record.group or (find((name, one.media.group()[0]))[1] if one.media else one.record.question)
        for name, one in asked
    }


def _agreeing(asked: list[tuple[str, Asked]], groups: dict[str, str], problems: Problems) -> list[tuple[str, Asked]]:
    """The questions that agree with those before them in their source on the group of one media."""
    group_of: dict[tuple[str, str], tuple[str, str]] = {}
    kept = []
    for name, one in asked:
        place, group = one.record.place, groups[one.record.id]
        with problems.at(place):
            other, expected = group_of.setdefault((name, media_key(one)), (place, group))
            if expected != group:
                raise BadRecordError(
                    f"expected the same group for the same media as at {other} ({expected!r}), found {group!r}; "
                    "make them agree, or tell them apart"
                )
            kept.append((name, one))
    return kept


def _splits(asked: list[tuple[str, Asked]], groups: dict[str, str], data: Data) -> dict[tuple[str, str], SplitName]:
    """The split of each source's groups: of those that its questions name the most held back, else by its hash."""
    named: dict[tuple[str, str], set[SplitName | None]] = defaultdict(set)
    for name, one in asked:
        named[name, groups[one.record.id]].add(one.record.split)
    return {
        (name, group): next((split for split in HELD_BACK if split in splits), None) or split_of(group, data)
        for (name, group), splits in named.items()
    }


def _without_repetition(questions: list[SourceRecord], dropped: Counter[str]) -> tuple[SourceRecord, ...]:
    """Questions about one media, each once, whatever its id, and answered where it is so once."""
    again = repeated(((None, one) for one in sorted(questions, key=lambda one: not one.accepted())), dropped)
    return tuple(one for one in questions if one.id not in again)


def _without_overlap(units: list[Unit], dropped: Counter[str]) -> list[Unit]:
    """The units, but for groups to learn from that show, in one unit or more, what another source is tested on."""
    first = units[0].source if units else ""
    tested = {what for unit in units if unit.source != first for what in _about(unit)}
    if not tested:
        return units
    learnt = [unit for unit in units if unit.source == first and unit.split != "test"]
    groups = {unit.group for unit in learnt if _about(unit) & tested}
    leaks = {unit.key: len(unit.questions) for unit in learnt if unit.group in groups}
    if leaks:
        dropped["media of the benchmark"] += sum(leaks.values())
    return [unit for unit in units if unit.key not in leaks]


def _about(unit: Unit) -> set[tuple[str, str]]:
    """What tells that units of two sources are about the same: files, named groups, ids of videos; or text alone."""
    names = (unit.group, *(unit.media.titles() if unit.media else ()), *(one.id for one in unit.questions))
    found = {("video", name) for name in video_ids(names)}
    found |= {("group", one.group) for one in unit.questions if one.group}
    if unit.media:
        return found | {("file", name) for name in unit.media.origins()}
    return found | {("text", one.question) for one in unit.questions}


def _limited(units: list[Unit], data: Data, dropped: Counter[str]) -> list[Unit]:
    """The units less questions that are not for their split, or more than were asked for; none without questions."""
    limits = {"train": data.train_samples, "validation": data.validation_samples, "test": data.test_samples}
    for split in limits:
        wanted = {}
        for unit in units:
            for one in unit.questions if unit.split == split else ():
                if split == "test" and one.question_type in data.train_only_types:
                    dropped["type that is not tested"] += 1
                elif split == "test" and not one.accepted():
                    dropped["test question without an answer"] += 1
                else:
                    wanted[one.id] = one.question_type
        if limits[split] is not None and len(wanted) > limits[split]:
            taken = stratified(wanted, limits[split], data.seed)
            dropped["beyond the number asked for"] += len(wanted) - len(taken)
            wanted = taken
        units = [
            replace(unit, questions=tuple(one for one in unit.questions if one.id in wanted))
            if unit.split == split
            else unit
            for unit in units
        ]
    return [unit for unit in units if unit.questions]

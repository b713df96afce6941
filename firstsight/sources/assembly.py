"""From questions to samples-to-be: media with all that is asked about them, each in a split, before any is decoded."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from firstsight.core.params import Data
from firstsight.data.records import Record
from firstsight.sources.overlap import video_ids
from firstsight.sources.problems import BadRecordError, Problems
from firstsight.sources.question import Asked, Media, Question
from firstsight.sources.splits import SplitName, split_of, stratified


@dataclass(frozen=True)
class Unit:
    """One media (None: none) and the questions about it. `key` is unique and becomes the sample's id."""

    key: str
    source: str
    media: Media | None
    group: str
    split: SplitName
    questions: tuple[Question, ...]

    def records(self) -> tuple[Record, ...]:
        return tuple(one.record() for one in self.questions)


def assemble(
    sources: Iterable[tuple[str, Iterable[Asked]]], data: Data, problems: Problems, dropped: Counter[str]
) -> list[Unit]:
    """Units in the order of their first question; what is left out is counted in `dropped`, by reason.

    Left out are repeated questions, what the benchmark's videos are asked in training, questions of
    `data.train_only_types` in the test split, and what exceeds `data.*_samples`. Problems are ids that two questions
    have, questions about one media that disagree on group or split, and questions without an answer.

    Args:
        sources: by name, the questions of each; what the second and later ones ask is the benchmark.
    """
    asked = [(name, one) for name, questions in sources for one in questions]
    asked = _answerable(asked, data, problems, dropped)
    groups = _groups(asked)
    asked = _agreeing(asked, groups, problems)
    by_media: dict[tuple[str, str], list[Asked]] = {}
    for name, one in asked:
        by_media.setdefault((name, media_key(one)), []).append(one)
    units = []
    for (name, key), same_media in by_media.items():
        group = groups[same_media[0].question.id]
        split = same_media[0].question.split or split_of(group, data)
        questions = _without_repetition([one.question for one in same_media], dropped)
        units.append(Unit(f"{name}:{key}", name, same_media[0].media, group, split, questions))
    return _limited(_without_overlap(units, dropped), data, dropped)


def media_key(one: Asked) -> str:
    """What makes two questions be about the same media. One without media is alone with itself."""
    return one.media.key() if one.media else f"text {one.question.id}"


def _answerable(asked: list[tuple[str, Asked]], data: Data, problems: Problems, dropped: Counter[str]) -> list:
    """The questions with an id of their own and an answer, or whose answer the teacher is to give."""
    places, kept = {}, []
    for name, one in asked:
        question = one.question
        with problems.at(question.place):
            if (other := places.setdefault(question.id, question.place)) != question.place:
                raise BadRecordError(
                    f"expected an id of its own, found {question.id!r} again, as at {other}; rename it"
                )
            if question.answer is None and data.unanswered == "refuse":
                raise BadRecordError(
                    "expected an answer, found none; add it, or remove the record, or set data.unanswered to teacher"
                )
            kept.append((name, one))
    return kept


def _groups(asked: list[tuple[str, Asked]]) -> dict[str, str]:
    """The group of every question, by its id: the one it names, else what its media show and all they are seen with."""
    leader: dict[str, str] = {}

    def find(part: str) -> str:
        while leader.setdefault(part, part) != part:
            leader[part] = leader[leader[part]]
            part = leader[part]
        return part

    for _, one in asked:
        parts = one.media.group() if one.media else ()
        for part in parts[1:]:
            # The lesser name leads, whatever the order of the questions.
            first, second = sorted((find(parts[0]), find(part)))
            leader[second] = first
    return {
        one.question.id: one.question.group or (find(one.media.group()[0]) if one.media else one.question.question)
        for _, one in asked
    }


def _agreeing(asked: list[tuple[str, Asked]], groups: dict[str, str], problems: Problems) -> list[tuple[str, Asked]]:
    """The questions that agree with those before them in their source: one media has one group, one group one split."""
    group_of: dict[tuple[str, str], tuple[str, Any]] = {}
    split_by_group: dict[tuple[str, str], tuple[str, Any]] = {}
    kept = []
    for name, one in asked:
        question, group = one.question, groups[one.question.id]
        with problems.at(question.place):
            for known, key, value, what in (
                (group_of, (name, media_key(one)), group, "group for the same media"),
                (split_by_group, (name, group), question.split, "split for the same group"),
            ):
                other, expected = known.setdefault(key, (question.place, value))
                if expected != value:
                    raise BadRecordError(
                        f"expected the same {what} as at {other} ({expected!r}), found {value!r}; "
                        "make them agree, or tell them apart"
                    )
            kept.append((name, one))
    return kept


def _without_repetition(questions: list[Question], dropped: Counter[str]) -> tuple[Question, ...]:
    """Questions about one media, each once, whatever its id; two that differ in their options are two."""
    kept: dict[tuple[str, tuple[str, ...]], Question] = {}
    for question in questions:
        if (question.question, question.options) in kept:
            dropped["duplicate"] += 1
        kept.setdefault((question.question, question.options), question)
    return tuple(kept.values())


def _without_overlap(units: list[Unit], dropped: Counter[str]) -> list[Unit]:
    """The units, but for those to learn from that show a video which another source is tested on."""
    first = units[0].source if units else ""
    tested = video_ids(name for unit in units if unit.source != first for name in _names(unit))
    kept = []
    for unit in units:
        if unit.source == first and unit.split != "test" and video_ids(_names(unit)) & tested:
            dropped["video of the benchmark"] += len(unit.questions)
        else:
            kept.append(unit)
    return kept


def _names(unit: Unit) -> tuple[str, ...]:
    return (unit.group, *(unit.media.group() if unit.media else ()), *(one.id for one in unit.questions))


def _limited(units: list[Unit], data: Data, dropped: Counter[str]) -> list[Unit]:
    """The units less questions that are not for their split, or more than were asked for; none without questions."""
    limits = {"train": data.train_samples, "validation": data.validation_samples, "test": data.test_samples}
    for split in limits:
        wanted = {}
        for unit in units:
            for one in unit.questions if unit.split == split else ():
                if split == "test" and one.question_type in data.train_only_types:
                    dropped["type that is not tested"] += 1
                elif split == "test" and one.answer is None:
                    dropped["test question without an answer"] += 1
                else:
                    wanted[one.id] = one.question_type
        if limits[split] is not None:
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

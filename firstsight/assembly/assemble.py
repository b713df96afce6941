"""Group the questions about the same image or video into units, and assign each unit to a split, before decoding."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from firstsight.assembly.splits import HELD_BACK, SplitName, is_labelled, split_of, stratified, stratified_splits
from firstsight.core.errors import UserError
from firstsight.core.params import Data
from firstsight.readers.overlap import video_ids
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, Media, SourceRecord, SourceText
from firstsight.records.sample import Record


@dataclass(frozen=True)
class Unit:
    """Hold an undecoded image or video (None: text alone) and the questions about it; `key` becomes the sample's id."""

    key: str
    source: str
    media: Media | None
    group: str
    split: SplitName
    questions: tuple[SourceRecord, ...]

    def records(self) -> tuple[Record, ...]:
        """Return the questions as the records that are written to the data set."""
        return tuple(one.to_record() for one in self.questions)


def assemble(
    sources: Iterable[tuple[str, Iterable[Asked]]], data: Data, problems: Problems, dropped: Counter[str]
) -> list[Unit]:
    """Return the units in the order of their first question, and count in `dropped` the questions left out, by reason.

    Left out are questions that name another split than their group's, duplicates, training and validation questions
    about media of the benchmark, questions of `data.train_only_types` in the test split, and questions beyond
    `data.*_samples`. Problems are ids that two questions share, questions about the same image or video with different
    groups, questions without an answer, answers that are none of `data.classes`, where there are classes, and texts
    among questions, or questions among texts, by what comes first.

    Args:
        sources: name and questions of each source; the first is the data set's, the others are the benchmark.

    Raises:
        UserError: there is a problem, and the policy of `problems` is `stop`; or the records are texts, and
            `data.labelled_fraction` is below 1.
    """
    asked = [(name, one) for name, questions in sources for one in questions]
    asked = _answerable(_of_one_kind(asked, data, problems), data, problems)
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
    units = _without_overlap(units, dropped)
    if data.classes:  # labels are taken from what is left, so that each class keeps its share of them
        return _labelled_by_class(_limited(units, data, dropped), data)
    return _limited([_labelled(unit, data) for unit in units], data, dropped)


def media_key(one: Asked) -> str:
    """Return a key, equal for questions about the same image or video, and unique for a question about text alone."""
    return one.media.key() if one.media else f"text {one.record.id}"


def repeated(asked: Iterable[tuple[Hashable, SourceRecord]], dropped: Counter[str]) -> set[str]:
    """Return the ids of questions that repeat an earlier one about the same media, with the same text and options.

    Args:
        asked: what each question is about, and the question; the first of equal ones is not in the result.
        dropped: counts the repeated questions, with a reason of its own for those with another answer.
    """
    first: dict[tuple[Hashable, str, tuple[str, ...]], SourceRecord] = {}
    again = set()
    for about, one in asked:
        before = first.setdefault((about, one.wording, one.options), one)
        if before is not one:
            again.add(one.id)
            same = set(one.accepted()) <= set(before.accepted())
            dropped["duplicate" if same else "another answer to the same question"] += 1
    return again


def _of_one_kind(asked: list[tuple[str, Asked]], data: Data, problems: Problems) -> list[tuple[str, Asked]]:
    """Return the records of the kind of the first, texts or questions, which are measured differently; report others.

    Raises:
        UserError: they are texts, and `data.labelled_fraction` leaves some without what they consist of.
    """
    if not asked:
        return []
    first, kept = asked[0][1].record, []
    texts = isinstance(first, SourceText)
    if texts and data.labelled_fraction < 1:
        raise UserError(
            f"data.labelled_fraction: expected 1, because {first.place} is a text, found {data.labelled_fraction:g}; "
            "set it to 1, and data.train_samples to take fewer texts"
        )
    for name, one in asked:
        with problems.at(one.record.place):
            if isinstance(one.record, SourceText) != texts:
                expected, found = ("a text", "a question") if texts else ("a question", "a text")
                raise BadRecordError(
                    f"expected {expected}, as at {first.place}, found {found}; keep texts and questions in files and "
                    "runs of their own"
                )
            kept.append((name, one))
    return kept


def _answerable(asked: list[tuple[str, Asked]], data: Data, problems: Problems) -> list[tuple[str, Asked]]:
    """Return the questions with a unique id and an answer (unless the teacher is to give it); report the others."""
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
            if data.classes and (other := [answer for answer in record.accepted() if answer not in data.classes]):
                raise BadRecordError(
                    f"expected one of the {len(data.classes)} classes of data.classes, found {other[0][:60]!r}; add it "
                    "there, or correct the record"
                )
            kept.append((name, one))
    return kept


def _groups(asked: list[tuple[str, Asked]]) -> dict[str, str]:
    """Return the group of each question, by its id.

    It is the group that the question names, else that of its media: media that share a part, such as a file or video,
    are in one group, also through others (union-find).
    """
    leader: dict[tuple[str, str], tuple[str, str]] = {}

    def find(part: tuple[str, str]) -> tuple[str, str]:
        while leader.setdefault(part, part) != part:
            leader[part] = leader[leader[part]]
            part = leader[part]
        return part

    for name, one in asked:
        parts = [(name, part) for part in one.media.group()] if one.media else []
        for part in parts[1:]:
            # The lesser name represents both, so that the order of the questions does not matter.
            first, second = sorted((find(parts[0]), find(part)))
            leader[second] = first
    return {
        one.record.id: one.record.group or (find((name, one.media.group()[0]))[1] if one.media else one.record.wording)
        for name, one in asked
    }


def _agreeing(asked: list[tuple[str, Asked]], groups: dict[str, str], problems: Problems) -> list[tuple[str, Asked]]:
    """Return the questions whose group is that of earlier ones about the same image or video; report the others."""
    group_of: dict[tuple[str, str], tuple[str, str]] = {}
    kept = []
    for name, one in asked:
        place, group = one.record.place, groups[one.record.id]
        with problems.at(place):
            other, expected = group_of.setdefault((name, media_key(one)), (place, group))
            if expected != group:
                raise BadRecordError(
                    f"expected the same group for the same media as at {other} ({expected!r}), found {group!r}; "
                    "give both questions the same group"
                )
            kept.append((name, one))
    return kept


def _splits(asked: list[tuple[str, Asked]], groups: dict[str, str], data: Data) -> dict[tuple[str, str], SplitName]:
    """Return the split of each source's groups: the most held-back one that its questions name, else by hash.

    With classes, those that name none are split so that every class has its share.
    """
    named: dict[tuple[str, str], set[SplitName | None]] = defaultdict(set)
    class_of: dict[str, str] = {}
    for name, one in asked:
        group = groups[one.record.id]
        named[name, group].add(one.record.split)
        if data.classes and one.record.split is None:
            class_of.setdefault(group, one.record.answer or "")
    chosen = stratified_splits(class_of, data)
    return {
        (name, group): next((split for split in HELD_BACK if split in splits), None)
        or chosen.get(group)
        or split_of(group, data)
        for (name, group), splits in named.items()
    }


def _without_repetition(questions: list[SourceRecord], dropped: Counter[str]) -> tuple[SourceRecord, ...]:
    """Return the questions about one image or video without duplicates, keeping one with an answer if there is one."""
    again = repeated(((None, one) for one in sorted(questions, key=lambda one: not one.accepted())), dropped)
    return tuple(one for one in questions if one.id not in again)


def _without_overlap(units: list[Unit], dropped: Counter[str]) -> list[Unit]:
    """Return the units without the training and validation groups that contain media of the benchmark."""
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


def _labelled(unit: Unit, data: Data) -> Unit:
    """Return the unit, without its answers where it is for training and `data.labelled_fraction` leaves it out."""
    if unit.split != "train" or is_labelled(unit.group, data):
        return unit
    return _bare(unit)


def _labelled_by_class(units: list[Unit], data: Data) -> list[Unit]:
    """Return the units, of which the share `data.labelled_fraction` of each class keeps its answers, for training."""
    class_of = {unit.group: unit.questions[0].answer or "" for unit in units if unit.split == "train"}
    kept = stratified(class_of, round(data.labelled_fraction * len(class_of)), data.seed)
    return [_bare(unit) if unit.split == "train" and unit.group not in kept else unit for unit in units]


def _bare(unit: Unit) -> Unit:
    """Return the unit without its answers."""
    bare = [one.model_copy(update={"answer": None, "answers": ()}) for one in unit.questions]
    return replace(unit, questions=tuple(bare))


def _about(unit: Unit) -> set[tuple[str, str]]:
    """Return the names by which two sources' units are recognised as the same: files, groups, video ids, or text."""
    names = (unit.group, *(unit.media.titles() if unit.media else ()), *(one.id for one in unit.questions))
    found = {("video", name) for name in video_ids(names)}
    found |= {("group", one.group) for one in unit.questions if one.group}
    if unit.media:
        return found | {("file", name) for name in unit.media.origins()}
    return found | {("text", one.wording) for one in unit.questions}


def _limited(units: list[Unit], data: Data, dropped: Counter[str]) -> list[Unit]:
    """Return the units without questions that their split excludes or has no room for, and without empty units."""
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
                    wanted[one.id] = (one.answer or "") if data.classes else one.question_type
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

"""Groups, splits and samples: properties that hold for any set of questions."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstsight.assembly.assemble import assemble
from firstsight.assembly.near_duplicates import seen_in
from firstsight.assembly.splits import stratified
from firstsight.core.errors import UserError
from firstsight.readers.problems import BadRecordError, Problems
from firstsight.readers.source_record import Asked, source_record
from firstsight.records.parquet import Split, SplitWriter
from firstsight.records.sample import Sample


@dataclass(frozen=True)
class Shown:
    """Media that are never decoded."""

    names: tuple[str, ...]
    kind: str = "frames"
    root: str = "media"

    def key(self):
        return "|".join(self.names)

    def group(self):
        return self.names

    def titles(self):
        return self.names

    def origins(self):
        return tuple(f"/{self.root}/{name}" for name in self.names)


def ask(number, names=(), root="media", **values):
    given = {"id": f"q{number}", "question": f"Question {number}?", "answer": "so"} | values
    return Asked(source_record(f"line {number}", **given), Shown(tuple(names), root=root) if names else None)


def units(settings, asked, dropped=None, policy="stop", **data):
    data = settings.data.model_copy(update=data)
    sources = asked if isinstance(asked, dict) else {"source": asked}
    return assemble(sources.items(), data, Problems(policy), Counter() if dropped is None else dropped)


NAMES = st.lists(st.sampled_from([f"{letter}.jpg" for letter in "abcdefghij"]), max_size=3, unique=True)
QUESTIONS = st.lists(NAMES, min_size=1, max_size=30)


@given(media=QUESTIONS)
def test_no_media_and_no_group_is_in_two_splits(settings, media):
    splits_of = defaultdict(set)
    for unit in units(settings, [ask(n, names) for n, names in enumerate(media)]):
        for part in (unit.group, *(unit.media.names if unit.media else ())):
            splits_of[part].add(unit.split)
    assert all(len(splits) == 1 for splits in splits_of.values())


@given(media=QUESTIONS, more=QUESTIONS)
def test_more_records_about_other_media_move_none(settings, media, more):
    before = [ask(n, names) for n, names in enumerate(media)]
    after = [ask(n + 100, [f"new-{name}" for name in names]) for n, names in enumerate(more)]
    found = [
        {(one.id, unit.split) for unit in units(settings, asked) for one in unit.questions}
        for asked in (before, before + after, after + before)
    ]
    assert found[0] <= found[1] == found[2]


@given(media=QUESTIONS)
def test_the_order_of_records_does_not_matter_to_their_splits(settings, media):
    asked = [ask(n, names) for n, names in enumerate(media)]
    found = [{(one.id, u.split, u.group) for u in units(settings, order) for one in u.questions}
             for order in (asked, asked[::-1])]  # fmt: skip
    assert found[0] == found[1]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip())


@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_every_record_is_read_back_as_it_was_written(settings, tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("split") / "train.parquet"
    try:
        asked = [ask(n, ["a.jpg"], question=text, answer=answer) for n, (text, answer) in enumerate(texts)]
    except BadRecordError as error:  # a special token, by chance
        assert "special token" in str(error)
        return
    (unit,) = units(settings, asked)
    sample = Sample(unit.key, unit.group, unit.source, "frames", (b"jpeg", b"\0"), 0.0, unit.records())
    with SplitWriter(path) as writer:
        writer.write(sample)
    assert list(Split(path)) == [sample]


@given(
    types=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), count=st.integers(1, 70), seed=st.integers(0, 3)
)
def test_a_sample_has_the_types_in_proportion(types, count, seed):
    type_of = {f"q{n}": kind for n, kind in enumerate(types)}
    taken = stratified(type_of, count, seed)
    assert len(taken) == min(count, len(types))
    share = len(taken) / len(types)
    for kind, total in Counter(types).items():
        assert abs(sum(type_of[name] == kind for name in taken) - total * share) < 1


def test_samples_are_taken_by_split_and_counted(settings):
    asked = [ask(n, [f"{n}.jpg"], split="train" if n < 50 else "test", question_type="ab"[n % 2]) for n in range(60)]
    dropped = Counter()
    found = units(settings, asked, dropped, train_samples=20, test_samples=4)
    types = Counter((unit.split, one.question_type) for unit in found for one in unit.questions)
    assert types == {("train", "a"): 10, ("train", "b"): 10, ("test", "a"): 2, ("test", "b"): 2}
    assert dropped == {"beyond the number asked for": 36}


def test_repeated_questions_are_dropped_and_options_tell_questions_apart(settings):
    dropped = Counter()
    same = {"question": "What?", "answer": "a"}
    asked = [ask(0, ["a.jpg"], **same), ask(1, ["a.jpg"], **same), ask(2, ["b.jpg"], **same)]
    asked.append(ask(3, ["a.jpg"], **same, options=["a", "b"]))
    found = units(settings, asked, dropped)
    assert [[one.id for one in unit.questions] for unit in found] == [["q0", "q3"], ["q2"]]
    assert dropped == {"duplicate": 1}


def test_what_the_benchmark_shows_is_not_learnt_from(settings):
    video = "0d270946-95c5-4e71-ae49-b9e802548147"
    source = [ask(0, [f"ego4d/{video}_120.mp4"], split="train"), ask(1, ["other.mp4"], split="train")]
    benchmark = [ask(2, [f"{video}.mp4"], split="test"), ask(3, [f"ego4d/{video}_120.mp4"], split="test")]
    dropped = Counter()
    found = units(settings, {"source": source, "benchmark": benchmark}, dropped)
    assert [unit.questions[0].id for unit in found] == ["q1", "q2", "q3"]
    assert dropped == {"media of the benchmark": 1}


@pytest.mark.parametrize(
    ("learnt", "tested"),
    [
        (ask(0, ["a.mp4"], split="train"), ask(9, ["a.mp4"], split="test")),
        (ask(0, ["a.mp4"], split="validation", group="home"), ask(9, ["a.mp4"], split="test")),
        (ask(0, ["a.mp4"], split="train", group="home"), ask(9, ["b.mp4"], split="test", group="home")),
        (ask(0, question="Why?", split="train"), ask(9, question="Why?", split="test")),
    ],
)
def test_a_file_a_group_or_a_text_of_the_benchmark_is_not_learnt_from(settings, learnt, tested):
    """Nor is anything else of a group that has some of them."""
    others = [
        ask(1, ["c.mp4"], split=learnt.record.split, group=learnt.record.group or "other"),
        ask(2, ["e.mp4"], split="train", group="yet another"),
        ask(3, ["d.mp4"], split="test", group="d"),
    ]
    dropped = Counter()
    found = units(settings, {"source": [learnt, *others], "benchmark": [tested]}, dropped)
    lost = ["q0", "q1"] if learnt.record.group else ["q0"]
    assert [one.id for unit in found for one in unit.questions] == [
        name for name in ("q0", "q1", "q2", "q3", "q9") if name not in lost
    ]
    assert dropped == {"media of the benchmark": len(lost)}


def test_a_file_of_the_same_name_elsewhere_is_another(settings):
    source = [ask(0, ["a.mp4"], split="train"), ask(1, ["a.mp4", "b.mp4"], split="train")]
    benchmark = [ask(9, ["a.mp4"], root="elsewhere", split="test"), ask(8, ["c.mp4"], root="elsewhere", split="test")]
    found = units(settings, {"source": source, "benchmark": benchmark})
    assert [unit.split for unit in found] == ["train", "train", "test", "test"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([{"id": "x"}, {"id": "x"}], "line 1: .* found 'x' again, as at line 0; rename one .a record without"),
        ([{"answer": None}], "line 0: expected an answer, found none"),
        ([{"group": "g"}, {"group": "h"}], "line 1: expected the same group for the same media as at line 0"),
    ],
)
def test_records_that_disagree_are_refused_or_skipped(settings, asked, message):
    asked = [ask(n, ["a.jpg"], **values) for n, values in enumerate(asked)]
    with pytest.raises(UserError, match=message):
        units(settings, asked)
    found = units(settings, asked, policy="skip")
    assert sum(len(unit.questions) for unit in found) == len(asked) - 1


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("splits", "kept"),
    [
        (["train", "test"], ["test"]),
        (["train", "validation", "test"], ["test"]),
        (["train", "validation"], ["validation"]),
        ([None, "train"], ["train", "train"]),
        ([None, "test"], ["test", "test"]),
        ([None, "train", "validation"], ["validation", "validation"]),
    ],
)
def test_a_group_is_in_the_most_held_back_split_that_is_named(settings, splits, kept, order):
    dropped = Counter()
    asked = [ask(n, ["a.jpg"], split=split) for n, split in enumerate(splits)][::order]
    found = units(settings, asked, dropped, validation_fraction=0.01, test_fraction=0.01)
    assert [unit.split for unit in found for _ in unit.questions] == kept
    assert dropped == ({"group of another split": len(splits) - len(kept)} if len(splits) > len(kept) else {})


def test_of_a_question_asked_twice_the_answered_stays_and_another_answer_is_told(settings):
    dropped = Counter()
    asked = [
        ask(0, ["a.jpg"], question="What?", answer=None),
        ask(1, ["a.jpg"], question="What?", answer="a cup", answers=["cup"]),
        ask(2, ["a.jpg"], question="What?", answer="cup"),
        ask(3, ["a.jpg"], question="What?", answer="a mug"),
    ]
    (unit,) = units(settings, asked, dropped, unanswered="teacher")
    assert [one.id for one in unit.questions] == ["q1"]
    assert dropped == {"duplicate": 2, "another answer to the same question": 1}


def test_a_question_with_accepted_answers_alone_is_answered(settings):
    asked = [ask(0, ["a.jpg"], answer=None, answers=["so", "thus"], split="test")]
    (unit,) = units(settings, asked)
    assert unit.records()[0].answer == "so"


def test_a_number_asked_for_that_is_there_leaves_nothing_out(settings):
    dropped = Counter()
    units(settings, [ask(0, ["a.jpg"], split="train")], dropped, train_samples=1)
    assert dropped == {}


def test_unanswered_questions_are_for_the_teacher_and_not_tested(settings):
    dropped = Counter()
    asked = [ask(n, [f"{n}.jpg"], answer=None, split=split) for n, split in enumerate(["train", "test"])]
    (unit,) = units(settings, asked, dropped, unanswered="teacher")
    assert (unit.split, unit.records()[0].answer, unit.records()[0].answers) == ("train", "", ())
    assert dropped == {"test question without an answer": 1}


def test_near_duplicates_are_found_among_others_and_recompression_is_one():
    random = np.random.default_rng(0)
    looks = random.integers(20, 235, (200, 3, 12, 12, 3), dtype=np.uint8)
    noise = random.integers(-4, 5, looks.shape)
    again = (looks[50:60].astype(int) + noise[50:60]).astype(np.uint8)
    assert seen_in(again, looks).tolist() == list(range(50, 60))
    assert seen_in(again, looks[60:]).tolist() == [-1] * 10
    assert seen_in(again, looks[:0]).tolist() == [-1] * 10
    # Another object: a ninth of the picture, in another colour.
    changed = looks[:1].copy()
    changed[:, :, :4, :4] = 255 - changed[:, :, :4, :4]
    assert seen_in(changed, looks).tolist() == [-1]

"""Records read back as written, splits that leak nothing."""

import dataclasses
import random
from collections import Counter

import pytest
from conftest import make_sample

from firstsight.assembly.splits import split_of
from firstsight.core.errors import UserError
from firstsight.packing.dataset import OnlineTeacher, PackedDataset
from firstsight.records import parquet
from firstsight.records.parquet import Split, SplitWriter


def test_samples_read_back_equal_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "_ROW_GROUP_BYTES", 5000)  # several row groups
    monkeypatch.setattr(parquet, "_GROUPS_KEPT", 2)
    kinds = [("image", 1), ("video", 4), ("none", 0), ("frames", 3)] * 5
    written = [
        make_sample(f"s{number}", kind, frames, [("Why?", "so")] * (number % 3 + 1))
        for number, (kind, frames) in enumerate(kinds)
    ]
    path = tmp_path / "train.parquet"
    with SplitWriter(path) as writer:
        for sample in written:
            writer.write(sample)
    split = Split(path)
    assert len(split) == len(written)
    assert split.record_counts() == [len(sample.records) for sample in written]
    order = random.Random(0).sample(range(len(written)), len(written))
    assert [split[index] for index in order] == [written[index] for index in order]
    with pytest.raises(IndexError):
        split[len(written)]


def test_which_records_have_an_answer_is_known_without_reading_a_sample(tmp_path, monkeypatch):
    asked = {"a": ["so"], "b": ["", "so", ""], "c": ["", ""]}
    with SplitWriter(tmp_path / "train.parquet") as writer:
        for name, given in asked.items():
            writer.write(make_sample(name, "image", 1, [("Why?", answer) for answer in given]))
    split = Split(tmp_path / "train.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(Split, "__getitem__", None)
        assert split.has_answers()
        unanswered = split.unanswered()
        answered = split.answered({"b-2": "then", "c-0": ""})
        assert answered.record_counts() == [1, 2]
    found = {row: [split[row].records.index(record) for record in records] for row, records in unanswered.items()}
    assert found == {1: [0, 2], 2: [0, 1]}
    assert [[one.answer for one in sample.records] for sample in answered] == [["so"], ["so", "then"]]


@pytest.mark.parametrize("content", [None, b"", b"not parquet"])
def test_a_broken_split_is_named(tmp_path, content):
    path = tmp_path / "train.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"train\.parquet: expected a split's parquet file"):
        Split(path)


def test_options_follow_the_question_with_letters():
    record = dataclasses.replace(make_sample("s", "none", 0, [("What?", "B")]).records[0], options=("a cup", "a ball"))
    assert record.prompt().splitlines() == [
        "What?",
        "A. a cup",
        "B. a ball",
        "Answer with the option's letter from the given choices directly.",
    ]


def test_splits_are_by_group_in_proportion_and_move_with_the_seed_alone(settings):
    data = settings.data.model_copy(update={"validation_fraction": 0.2, "test_fraction": 0.1})
    groups = [f"video-{number}" for number in range(5000)]
    split = {group: split_of(group, data) for group in groups}
    counts = Counter(split.values())
    assert counts["test"] == pytest.approx(500, abs=80)
    assert counts["validation"] == pytest.approx(1000, abs=110)
    assert {group: split_of(group, data) for group in groups[:100]} == {group: split[group] for group in groups[:100]}
    reseeded = data.model_copy(update={"seed": 1})
    assert any(split_of(group, reseeded) != split[group] for group in groups)


def test_text_outside_the_corpus_survives_the_tokenizer(processor):
    text = "Über 5 Café-Gäste: 漢字 🙂"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_other_answer_tokens_than_the_teachers_are_named(processor):
    class Shifted(OnlineTeacher):
        """A teacher whose second answer begins with another token."""

        def answers(self, sample, records):
            first, second = super().answers(sample, records)
            return [first, [second[0] + 1, *second[1:]]]

    sample = make_sample("clip", "image", 1, [("What?", "a cup"), ("Where?", "left hand")])

    class OneSample(list):
        path = "train.parquet"

        def record_counts(self):
            return [len(sample.records)]

    PackedDataset(OneSample([sample]), processor, OnlineTeacher(processor)).check_answers()
    with pytest.raises(UserError, match=r"record clip-1: expected the teacher's answer tokens, where token 0 is"):
        PackedDataset(OneSample([sample]), processor, Shifted(processor)).check_answers()

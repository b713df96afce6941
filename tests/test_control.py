"""The control: what the student learns without a teacher, and the few labels that it learns from."""

import json

import pytest
import torch
from conftest import change, run_stage
from safetensors.torch import load_file

from firstsight.assembly.splits import is_labelled
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.variants import LEFT_OUT, TRAINED_ALONE
from firstsight.generation.answering import Answer
from firstsight.records.parquet import Split
from firstsight.records.sample import SPLITS


def weights(folder, name):
    return load_file(folder / f"models/{name}/model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def history(folder, name):
    return json.loads((folder / f"models/{name}/history.json").read_text())


def few_labels(folder, fraction=0.3):
    """Build the data anew with few labels, and let the teacher answer the rest."""
    change(folder, "data", labelled_fraction=fraction, unanswered="teacher")
    for stage in ("build_egoqa_dataset", "cache_teacher_targets"):
        run_stage(folder, stage)


def labelled(split):
    return [index for index, sample in enumerate(split) if all(record.answer for record in sample.records)]


@pytest.mark.system
def test_it_is_the_student_distilled_with_no_weight_on_the_teacher(smoke_copy):
    change(smoke_copy, "train", alpha=0.0)
    run_stage(smoke_copy, "distill")
    assert equal(weights(smoke_copy, "student-finetuned"), weights(smoke_copy, "student-distilled"))
    few_labels(smoke_copy)
    change(smoke_copy, "control", answers="teacher")
    for stage in ("distill", "finetune_student"):
        run_stage(smoke_copy, stage)
    assert equal(weights(smoke_copy, "student-finetuned"), weights(smoke_copy, "student-distilled"))


@pytest.mark.system
def test_it_learns_from_the_labels_alone_in_as_many_steps_and_evaluations(smoke_copy):
    few_labels(smoke_copy)
    for stage in ("distill", "finetune_student"):
        run_stage(smoke_copy, stage)
    rows = {name: history(smoke_copy, name) for name in ("student-distilled", "student-finetuned")}
    steps = {name: [(row["step"], "eval_ce" in row) for row in found] for name, found in rows.items()}
    assert steps["student-finetuned"] == steps["student-distilled"]
    first = weights(smoke_copy, "student-finetuned")
    # Other answers of the teacher, and another temperature, are nothing to it.
    answers = smoke_copy / "data/teacher-targets/answers.json"
    answers.write_text(json.dumps({name: given and "green" for name, given in json.loads(answers.read_text()).items()}))
    change(smoke_copy, "train", temperature=7.0, alpha=0.1, divergence="jsd")
    run_stage(smoke_copy, "finetune_student")
    assert equal(weights(smoke_copy, "student-finetuned"), first)
    change(smoke_copy, "control", answers="teacher")
    run_stage(smoke_copy, "finetune_student")
    assert not equal(weights(smoke_copy, "student-finetuned"), first)


@pytest.mark.system
@pytest.mark.parametrize(
    ("enabled", "reason"),
    [
        (False, "control.enabled is false"),
        (True, "the train split has no question with an answer; set control.answers to teacher"),
    ],
)
def test_without_labels_or_where_it_is_not_wanted_it_is_left_out_and_distilling_goes_on(smoke_copy, enabled, reason):
    if enabled:
        few_labels(smoke_copy, 0.0)
        run_stage(smoke_copy, "distill")
    change(smoke_copy, "control", enabled=enabled)
    run_stage(smoke_copy, "finetune_student")
    run_stage(smoke_copy, "evaluate", "student-finetuned")
    for folder, files in {"models": {LEFT_OUT, TRAINED_ALONE}, "evaluations": {LEFT_OUT}}.items():
        found = smoke_copy / folder / "student-finetuned"
        assert {path.name for path in found.iterdir()} == files
        assert json.loads((found / LEFT_OUT).read_text()) == reason
    if enabled:
        for variant in ("teacher", "student", "student-distilled", "student-nf4"):
            run_stage(smoke_copy, "evaluate", variant)
    run_stage(smoke_copy, "report")
    assert "student-finetuned" not in json.loads((smoke_copy / "metrics/quality.json").read_text())


@pytest.mark.system
def test_a_teacher_that_answers_nothing_is_one_line(smoke_copy, monkeypatch):
    change(smoke_copy, "data", labelled_fraction=0.3, unanswered="teacher")
    run_stage(smoke_copy, "build_egoqa_dataset")

    def silent(model, processor, asked, *_):
        states = torch.zeros(1, model.config.get_text_config().hidden_size)
        return [Answer("", [processor.tokenizer.eos_token_id], states)] * len(asked)

    monkeypatch.setattr("firstsight.distillation.teacher_answers.generated_answers", silent)
    expected = r"models/teacher-finetuned: expected answers to the \d+ questions .* found no usable one; take a teacher"
    with pytest.raises(UserError, match=expected):
        run_stage(smoke_copy, "cache_teacher_targets")


@pytest.mark.system
def test_few_training_scenes_keep_their_answers_and_all_others_do(smoke_copy):
    files = {split: smoke_copy / f"data/egoqa/{split}.parquet" for split in SPLITS}
    before = {split: list(Split(path)) for split, path in files.items()}
    kept = {}
    for fraction in (0.0, 0.3, 0.6, 1.0):
        change(smoke_copy, "data", labelled_fraction=fraction, unanswered="teacher")
        run_stage(smoke_copy, "build_egoqa_dataset")
        train = Split(files["train"])
        kept[fraction] = set(labelled(train))
        # A scene has all of its answers or none.
        assert len(train) - len(kept[fraction]) == sum(
            not any(record.answer or record.answers for record in sample.records) for sample in train
        )
        for split in ("validation", "test"):
            assert list(Split(files[split])) == before[split]
    assert list(train) == before["train"]
    assert kept[0.0] == set()
    assert kept[0.3] < kept[0.6] < kept[1.0] == set(range(len(train)))
    card = json.loads((smoke_copy / "data/egoqa/card.json").read_text())
    assert card["splits"]["train"]["unanswered"] == 0


def test_the_share_of_labelled_groups_is_that_asked_for(settings):
    for fraction in (0.05, 0.5):
        data = settings.data.model_copy(update={"labelled_fraction": fraction})
        found = sum(is_labelled(f"group {number}", data) for number in range(10_000)) / 10_000
        assert abs(found - fraction) < 0.01
        other = data.model_copy(update={"seed": 1})
        assert any(is_labelled(f"{n}", data) != is_labelled(f"{n}", other) for n in range(200))


def test_labels_left_out_need_a_teacher_to_answer(smoke_copy):
    change(smoke_copy, "data", labelled_fraction=0.5)
    with pytest.raises(
        UserError, match=r"data: expected unanswered: teacher, because labelled_fraction is below 1, found"
    ):
        params.load(smoke_copy / "params.yaml")


def test_samples_are_repeated_in_their_order(smoke):
    split = Split(smoke / "data/egoqa/train.parquet").answered({})
    longer = split.repeated_to(2 * len(split) + 3)
    ids = [sample.id for sample in split]
    assert [sample.id for sample in longer] == ids + ids + ids[:3]
    assert longer.record_counts() == [len(sample.records) for sample in longer]

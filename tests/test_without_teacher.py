"""`models.teacher: null`: a student is fine-tuned alone, by the same stages, and reported before and after."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, YAML_SAFE, change, command, new_project, run_stage, warm, workspace, write_params
from peft import PeftModel
from safetensors.torch import load_file
from text_families import ANSWERS, TEXT_SAVE, save_bert

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.variants import CONTROL, LEFT_OUT
from firstsight.models.loading import load_model
from firstsight.planning import plan_table
from firstsight.planning.workload import Sizes, Workload
from firstsight.publishing.checks import check_folder
from firstsight.publishing.model_card import model_card
from firstsight.reporting.comparison import show


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """The words of the commands in docs/text.md: take the preset, run it, publish what it made."""
    (block,) = re.findall(r"^```\n(cp .*?)^```", (ROOT / "docs/text.md").read_text(), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for line in block.splitlines()]


@pytest.fixture(scope="module")
def alone(settings, processor, commands, tmp_path_factory) -> Path:
    """A clone after these commands, with a tiny GPT-2, few questions and few steps."""
    project = new_project(tmp_path_factory.mktemp("alone") / "project")
    (project / "gpt2").mkdir()
    TEXT_SAVE["gpt2"](project / "gpt2", settings, processor)
    asked = [f"After {n} minutes, what is at place {n % 4}?" for n in range(60)]
    rows = [{"question": question, "answer": ANSWERS[n % 4], "group": str(n)} for n, question in enumerate(asked)]
    (project / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    take, run, _ = commands
    command(project, *take)
    change(project, "models", student={"source": "gpt2", "revision": None, "init": None})
    change(project, "data", path="qa.jsonl", validation_fraction=0.2, test_fraction=0.2, train_samples=None)
    adapter = {"rank": 8, "lora_alpha": 16.0, "dropout": 0.0, "target_modules": None}
    change(project, "train", adapter=adapter, epochs=20, early_stopping_epochs=20, learning_rate=5e-3)
    change(project, "evaluate", max_new_tokens=8, bootstrap_samples=100, latency_runs=2, latency_new_tokens=4)
    change(project, "runtime", device="cpu", data_workers=0)
    command(project, "git", "init", "--quiet")
    command(project, "git", "config", "user.name", "test")
    command(project, "git", "config", "user.email", "test@example.org")
    command(project, *run, **warm())
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", "run")
    return project


@pytest.mark.system
def test_the_stages_of_a_teacher_are_left_out_and_say_why(alone):
    left_out = ("models/teacher", "models/teacher-finetuned", "data/teacher-targets", "models/student-distilled")
    left_out += ("evaluations/teacher", "evaluations/student-distilled")
    for folder in left_out:
        assert json.loads((alone / folder / LEFT_OUT).read_text()) == "models.teacher is null"
        assert not list((alone / folder).glob("*.safetensors"))
    # On which quantize-student depends; null where there is a teacher.
    assert json.loads((alone / "models/student-finetuned/trained-alone.json").read_text())


@pytest.mark.system
def test_the_student_is_reported_before_and_after_fine_tuning(alone, monkeypatch, capsys):
    quality = json.loads((alone / "metrics/quality.json").read_text())
    assert set(quality) == {"question-only", "majority-answer", "student", CONTROL, "student-int8", "student-nf4"}
    before, after = quality["student"], quality[CONTROL]
    assert after["exact_match"] > before["exact_match"]
    assert after["gain"] == after["exact_match"] - before["exact_match"]
    assert {"retention", "teacher_agreement"} & set(after) == set()
    assert set(json.loads((alone / "metrics/models.json").read_text())) == {"student"}
    figures = json.loads((alone / "metrics/metrics.json").read_text())
    assert figures["finetuned"]["exact_match"] == after["exact_match"]
    monkeypatch.chdir(alone)
    show()
    printed = capsys.readouterr().out
    assert "Fine-tuned, the student answers " in printed
    assert "gain over that of student;" in printed
    assert "eacher" not in printed
    assert "distilled" not in printed
    summary = (alone / "metrics/summary.txt").read_text()
    assert "no criterion is judged, because there is no teacher" in summary
    assert "Against the teacher" not in summary
    page = (alone / "metrics/report.html").read_text()
    assert "student wrong, untrained right" in page
    assert "against the teacher" not in page
    assert "What fine-tuning added to exact match" in page
    card = model_card(CONTROL, f"models/{CONTROL}")
    check_folder(Path("models") / CONTROL)
    assert "pipeline_tag: text-generation" in card
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.strip()
    assert "FirstSight fine-tuned it on the answers of the data below" in card
    assert "student, before fine-tuning" in card
    assert "teacher |" not in card


@pytest.mark.system
def test_the_student_can_be_published(alone, commands):
    *_, publish = commands
    printed = command(alone, sys.executable, "-m", *publish)
    assert "merged-adapter/adapter_model.safetensors" in printed
    assert "nothing has been pushed" in printed


@pytest.mark.system
def test_the_adapter_is_kept_beside_the_merged_model(alone):
    base, merged = (load_model(alone / "models" / name, "float32", "cpu") for name in ("student", CONTROL))
    again = PeftModel.from_pretrained(base, alone / "models" / CONTROL / "merged-adapter").merge_and_unload()
    expected = merged.state_dict()
    assert all(value.allclose(expected[name], atol=1e-5) for name, value in again.state_dict().items())
    before = load_file(alone / "models/student/model.safetensors")
    assert not expected["transformer.h.0.attn.c_attn.weight"].equal(before["h.0.attn.c_attn.weight"])


@pytest.mark.system
@pytest.mark.parametrize("student", ["bert", "gpt2"])
def test_a_classifier_is_fine_tuned_alone_by_all_stages(settings, processor, tmp_path, monkeypatch, capsys, student):
    folder, names = workspace(tmp_path / "run", "text-smoke"), ["animal", "plant", "cup"]
    (folder / "hub").mkdir()
    if student == "bert":
        save_bert(folder / "hub")
    else:
        TEXT_SAVE[student](folder / "hub", settings, processor)
    rows = [{"text": f"What is at place {n}? The {names[n % 3]}", "class": names[n % 3]} for n in range(90)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    change(folder, "models", teacher=None, student={"source": "hub", "revision": None, "init": None})
    change(folder, "data", source="jsonl", path="records.jsonl", classes=names, prompt="{text}")
    change(folder, "data", unanswered="refuse", labelled_fraction=1.0, validation_fraction=0.2, test_fraction=0.2)
    change(folder, "finetune_teacher", enabled=False)
    change(folder, "train", alpha=0.0, epochs=12, early_stopping_epochs=12, learning_rate=5e-3, batch_size=4)
    change(folder, "evaluate", teacher_methods=[], bootstrap_samples=100, latency_runs=1, throughput_batch_sizes=[1])
    for stage in STAGES:
        run_stage(folder, *stage)
    quality = json.loads((folder / "metrics/quality.json").read_text())
    quantized = {"gpt2": {"student-nf4"}, "bert": set()}[student]
    assert set(quality) == {"question-only", "majority-answer", "student", CONTROL} | quantized
    before, after = quality["student"], quality[CONTROL]
    assert after["exact_match"] > 0.8 > before["exact_match"]
    assert set(after["by_class"]) == set(names)
    assert after["gain"] == pytest.approx(after["exact_match"] - before["exact_match"])
    assert {"retention", "teacher_agreement"} & set(after) == set()
    speed = json.loads((folder / "metrics/performance.json").read_text())[CONTROL]
    assert speed["token_ms"] == speed["latency_ms_p50"]
    assert (folder / "metrics/plots/confusion.png").exists()
    monkeypatch.chdir(folder)
    capsys.readouterr()
    show()
    assert "Fine-tuned, the student answers " in (printed := capsys.readouterr().out)
    assert "eacher" not in printed
    card = model_card(CONTROL, f"models/{CONTROL}")
    check_folder(Path("models") / CONTROL)
    assert "teacher |" not in card
    assert f"| accuracy | {after['exact_match']:.3f} (" in card
    exec(card.split("```python\n")[1].split("```")[0], {})
    # The example asks a language model something that is not of these data.
    assert capsys.readouterr().out.strip() in names or student != "bert"


def test_without_a_teacher_no_scores_are_normalised(tmp_path):
    document = YAML_SAFE.load(ROOT / "presets/text-smoke.yaml")
    document["models"]["teacher"] = None
    document["train"]["alpha"] = 0.0
    document["finetune_teacher"]["enabled"] = False
    document["targets"]["class_scores"] = "mean"
    write_params(tmp_path, document)
    line = "targets.class_scores: expected 'sum', because models.teacher is null, found 'mean'"
    with pytest.raises(UserError, match=line):
        params.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("section", "values", "line"),
    [
        ("train", {"alpha": 0.5}, "train.alpha: expected 0, because models.teacher is null, found 0.5"),
        ("finetune_teacher", {"enabled": True}, "finetune_teacher.enabled: expected False, because models.teacher is"),
        ("data", {"unanswered": "teacher"}, "data.unanswered: expected 'refuse', because models.teacher is null"),
        ("evaluate", {"teacher_methods": ["int8"]}, "evaluate.teacher_methods: expected [], because models.teacher"),
    ],
)
def test_what_needs_a_teacher_is_refused_without_one(tmp_path, section, values, line):
    document = YAML_SAFE.load(ROOT / "presets/smoke.yaml")
    document["models"]["teacher"] = None
    document["train"]["alpha"] = 0.0
    document["finetune_teacher"]["enabled"] = False
    document["data"] |= {"unanswered": "refuse", "labelled_fraction": 1.0}
    document["evaluate"]["teacher_methods"] = []
    document["export"] |= {"formats": [], "teacher": False}
    write_params(tmp_path, document)
    loaded = params.load(tmp_path / "params.yaml")
    sizes, counts = Sizes("none", 0, 0, 1, 8, 2), {"train": 4, "validation": 4, "test": 4}
    stages = {row.stage for row in plan_table.rows(loaded, Workload("", counts, counts, sizes, sizes, 0))}
    assert {"finetune-student", f"evaluate {CONTROL}"} <= stages
    assert not any("teacher" in stage or "distill" in stage for stage in stages)
    document[section] |= values
    write_params(tmp_path, document)
    with pytest.raises(UserError) as error:
        params.load(tmp_path / "params.yaml")
    assert line in str(error.value)

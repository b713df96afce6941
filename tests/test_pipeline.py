"""The pipeline as its users run it: stages, what they leave, what they refuse, and what DVC reruns."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, STAGES, YAML_SAFE, change, exchange_tokens, run_module, run_stage, workspace, write_params

from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files
from firstsight.core.variants import CONTROL

TABLE = "firstsight", "table"
PIPELINE = YAML_SAFE.load(ROOT / "dvc.yaml")["stages"]
REAL = ROOT.parent / "shared" / "realdata" / "open-eqa"


def test_each_stage_depends_on_its_own_parameters_alone():
    sections = {stage: definition.get("do", definition).get("params", []) for stage, definition in PIPELINE.items()}
    assert sections == {
        "download-models": ["models.${item}"],
        "build-egoqa-dataset": ["data"],
        "check-inputs": [
            *("targets.max_answer_tokens", "targets.over", "targets.class_scores", "targets.precision", "train.method"),
            *("finetune_teacher.enabled", "finetune_teacher.method", "evaluate.precision", "evaluate.engine"),
            *("evaluate.teacher_methods", "export.formats", "export.teacher"),
        ],
        "finetune-teacher": ["finetune_teacher"],
        "cache-teacher-targets": ["targets"],
        "cache-visual-tokens": ["train.method", "train.train_vision", "train.visual_tokens"],
        "distill": ["train"],
        # All of `train` but temperature, alpha and divergence.
        "finetune-student": [
            "control",
            "targets.over",
            *(
                f"train.{name}"
                for name in params.Train.model_fields
                if name not in ("temperature", "alpha", "divergence", "jsd_beta")
            ),
        ],
        "quantize-student": ["quantize"],
        "export-student": ["export.formats", "export.calibration_samples", "data.prompt"],
        "export-teacher": ["export.teacher", "data.prompt"],
        "evaluate": ["evaluate", "targets.class_scores"],
        "report": [
            "report",
            "control",
            "evaluate.bootstrap_samples",
            "evaluate.seed",
            "train.temperature",
            "train.alpha",
            "train.best",
        ],
    }


def test_the_smoke_run_leaves_metrics_plots_and_a_page(smoke):
    metrics = smoke / "metrics"
    quality = json.loads((metrics / "quality.json").read_text())
    baselines = {"majority-answer", "question-only"}
    assert set(quality) == baselines | {"teacher", "student", CONTROL, "student-distilled", "student-nf4"} | {
        "student-onnx-w4a8"
    }
    assert 0 <= quality["majority-answer"]["exact_match"] < quality["question-only"]["exact_match"] < 0.6
    assert quality["teacher"]["teacher_agreement"] == 1
    models = json.loads((metrics / "models.json").read_text())
    assert models["teacher"].keys() == models["student"].keys()
    assert models["teacher"]["architecture"] == "Qwen2VLForConditionalGeneration"
    assert models["student"]["dtype"] == "F32"
    assert 4 * models["student"]["parameters"] < models["student"]["bytes"] < models["teacher"]["bytes"]
    performance = json.loads((metrics / "performance.json").read_text())
    assert performance["teacher"]["compression"] == 1 < performance["student-distilled"]["compression"]
    assert performance["student-nf4"]["disk_bytes"] < performance["student-distilled"]["disk_bytes"]
    training = json.loads((metrics / "training.json").read_text())
    assert training["distill"]["validation_divergence"] > 0
    assert "validation_divergence" not in training["finetune-teacher"]
    page = (metrics / "report.html").read_text()
    assert page.count('<img src="data:image/') >= 4 + 8
    card = json.loads((smoke / "data/egoqa/card.json").read_text())
    for kind, count in card["splits"]["train"]["question_types"].items():
        assert f"<td>questions of type {kind}</td><td>{count}</td>" in page
    assert "http://" not in page
    assert "https://" not in page
    curve = (metrics / "plots/distill/validation.csv").read_text().splitlines()
    assert curve[0] == "step,loss"
    assert len(curve) == 3  # an evaluation an epoch
    types = card["splits"]["test"]["question_types"]
    assert (metrics / "plots/variants.csv").read_text().count("\n") == 1 + 6
    assert (metrics / "plots/by-type.csv").read_text().count("\n") == 1 + 6 * len(types)
    assert quality["student-nf4"]["gain_by_type"].keys() == types.keys()
    assert len(list((metrics / "plots").glob("*.png"))) == 8
    predictions = json.loads((smoke / "evaluations/teacher/predictions.json").read_text())
    assert len(predictions) == quality["teacher"]["questions"]


@pytest.mark.system
def test_the_table_is_printed_from_the_metrics(smoke):
    printed = run_module(smoke, *TABLE).stdout
    for word in ("student-nf4", "exact match", "retention", "latency", "question only", "metrics/report.html"):
        assert word in printed


@pytest.mark.system
def test_some_variants_are_shown_before_there_is_a_report(smoke_copy):
    shutil.rmtree(smoke_copy / "metrics")
    printed = run_module(smoke_copy, *TABLE, "teacher", "student-nf4").stdout.splitlines()
    assert [line.split()[0] for line in printed[2:]] == ["teacher", "student-nf4"]
    latency = json.loads((smoke_copy / "evaluations/teacher/performance.json").read_text())["latency_ms_p50"]
    assert f"{latency:.1f} ms" in printed[2]
    assert "gpt: expected a variant, one of teacher, teacher-int8" in run_module(smoke_copy, *TABLE, "gpt").stderr
    refused = run_module(smoke_copy, *TABLE, "teacher-int8")
    assert refused.returncode == 1
    assert "evaluations/teacher-int8: expected figures, found that it is left out: evaluate.teacher" in refused.stderr


def test_training_lowers_the_distillation_loss(smoke):
    history = json.loads((smoke / "models/student-distilled/history.json").read_text())
    assert not any("runtime" in name for row in history for name in row)
    losses = [row["eval_objective"] for row in history if "eval_objective" in row]
    assert losses[-1] < losses[0]


@pytest.mark.system
def test_the_same_seed_gives_the_same_weights_and_the_same_metrics(smoke, smoke_copy):
    for stage in (("distill",), ("evaluate", "student-distilled")):
        run_stage(smoke_copy, *stage)
    for name in ("models/student-distilled/model.safetensors", "evaluations/student-distilled/quality.json"):
        assert fingerprint_files([smoke / name]) == fingerprint_files([smoke_copy / name]), name


@pytest.mark.system
def test_micro_batches_of_unequal_answers_train_as_one_batch(smoke, smoke_copy):
    """The loss is a mean over the answer tokens of the optimizer step, not of each micro-batch."""
    from safetensors.torch import load_file

    change(smoke_copy, "train", batch_size=2, gradient_accumulation_steps=4)
    run_stage(smoke_copy, "distill")
    whole, parts = (load_file(folder / "models/student-distilled/model.safetensors") for folder in (smoke, smoke_copy))
    moved = load_file(smoke / "models/student/model.safetensors")
    for name, weight in whole.items():
        assert (weight - parts[name]).norm() <= 2e-3 * (weight - moved[name]).norm() + 1e-6, name


@pytest.mark.system
def test_a_teacher_that_is_not_finetuned_is_handed_on(smoke_copy):
    change(smoke_copy, "finetune_teacher", enabled=False)
    given, taken = smoke_copy / "models/teacher-finetuned", smoke_copy / "models/teacher"
    # A student of an earlier run has a history, which belongs to its owner and is linked, not copied.
    (taken / "history.json").write_text("[1]")
    run_stage(smoke_copy, "finetune_teacher")
    assert (given / "model.safetensors").samefile(taken / "model.safetensors")
    assert json.loads((given / "history.json").read_text()) == []
    assert (taken / "history.json").read_text() == "[1]"
    for stage in (("cache_teacher_targets",), ("report",)):
        run_stage(smoke_copy, *stage)


def refuse_alpha(folder):
    change(folder, "train", alpha=2)
    return ("train.alpha",), STAGES


def refuse_vocabulary(folder):
    exchange_tokens(folder / "models/student")
    return ("models.student: expected the teacher's vocabulary, where token 300",), [
        ("check_inputs",),
        ("cache_teacher_targets",),
    ]


def refuse_other_students_targets(folder):
    refuse_vocabulary(folder)
    return ("data/teacher-targets: expected targets over the vocabulary",), [("distill",)]


def refuse_corrupted_model(folder):
    (folder / "models/student-distilled/model.safetensors").write_bytes(b"\x08\x00")
    return ("models/student-distilled: expected a complete",), [
        ("quantize_student", "nf4"),
        ("evaluate", "student-distilled"),
    ]


def refuse_changed_data(folder):
    shutil.copy(folder / "data/egoqa/test.parquet", folder / "data/egoqa/train.parquet")
    return ("data/teacher-targets: expected targets made from this train split",), [("distill",)]


def refuse_no_tokenizer(folder):
    (folder / "models/student/tokenizer.json").unlink()
    return ("models/student: expected a complete Hugging Face model folder",), [("distill",), ("evaluate", "student")]


def refuse_broken_head(folder):
    (folder / "data/teacher-targets/head.safetensors").write_bytes(b"\x00")
    return ("data/teacher-targets/head.safetensors: expected the file as it was written",), [("distill",)]


def refuse_diverging_training(folder):
    change(folder, "train", learning_rate=1e9, max_grad_norm=1e30)
    return ("training: expected a finite", "lower learning_rate"), [("distill",)]


def refuse_missing_data(folder):
    (folder / "data/egoqa/test.parquet").unlink()
    return ("data/egoqa/test.parquet: expected a split's parquet file",), [("evaluate", "student"), ("report",)]


def refuse_empty_source(folder):
    (folder / "qa.jsonl").write_text("\n")
    change(folder, "data", source="jsonl", path="qa.jsonl")
    return ("qa.jsonl: expected a JSON Lines file, found an empty file",), [("build_egoqa_dataset",)]


def refuse_unanswered_question(folder):
    (folder / "qa.jsonl").write_text('{"question": "What?"}\n')
    change(folder, "data", source="jsonl", path="qa.jsonl")
    return ("qa.jsonl: line 1: expected an answer, found none",), [("build_egoqa_dataset",)]


def refuse_missing_media(folder):
    (folder / "qa.jsonl").write_text('{"media": "clip.mp4", "question": "What?", "answer": "so"}\n')
    change(folder, "data", source="jsonl", path="qa.jsonl")
    return ("qa.jsonl: line 1: expected a media file, found no clip.mp4",), [("build_egoqa_dataset",)]


def refuse_empty_split(folder):
    (folder / "qa.jsonl").write_text('{"question": "What?", "answer": "so"}\n')
    change(folder, "data", source="jsonl", path="qa.jsonl")
    return ("data: expected records in every split",), [("build_egoqa_dataset",)]


def refuse_unknown_model(folder):
    values = YAML_SAFE.load(folder / "params.yaml")
    values["models"]["student"]["source"] = "no/such/folder/anywhere"
    write_params(folder, values)
    return ("no/such/folder/anywhere: expected",), [("download_models", "student")]


@pytest.mark.parametrize(
    "damage",
    [
        refuse_alpha,
        refuse_vocabulary,
        refuse_other_students_targets,
        refuse_corrupted_model,
        refuse_changed_data,
        refuse_no_tokenizer,
        refuse_broken_head,
        refuse_diverging_training,
        refuse_missing_data,
        refuse_empty_source,
        refuse_unanswered_question,
        refuse_missing_media,
        refuse_empty_split,
        refuse_unknown_model,
    ],
)
def test_bad_input_is_one_line_and_leaves_outputs_intact(smoke_copy, damage):
    parts, stages = damage(smoke_copy)
    before = snapshot(smoke_copy)
    for stage in stages:
        with pytest.raises(UserError) as error:
            run_stage(smoke_copy, *stage)
        assert "\n" not in str(error.value)
        assert all(part in str(error.value) for part in parts)
    assert snapshot(smoke_copy) == before


@pytest.mark.system
def test_a_users_mistake_ends_the_process_with_one_line_and_status_one(smoke_copy):
    change(smoke_copy, "train", alpha=2)
    ended = run_module(smoke_copy, "stages.report")
    assert ended.returncode == 1
    assert ended.stderr == "error: params.yaml: train.alpha: expected at most 1, found 2\n"


@pytest.mark.system
@pytest.mark.skipif(not REAL.exists(), reason="the real clip lies beside the repository in development only")
def test_a_real_clip_goes_through_every_stage(tmp_path):
    """Three windows of one walk, so that every split has some: real decoding, free-form answers, the same stages."""
    folder = workspace(tmp_path)
    questions = json.loads((REAL / "open-eqa-demo-data.json").read_text())
    windows = {"train": (0.0, 6.0), "validation": (6.0, 11.0), "test": (11.0, None)}
    lines = [
        {
            "media": str(REAL / "open-eqa-hm3d-demo.mp4"),
            "start": start,
            **({"end": end} if end else {}),
            "group": split,
            "split": split,
            "question": question["question"],
            "answer": question["answer"],
            "question_type": question["category"],
        }
        for split, (start, end) in windows.items()
        for question in questions
    ]
    (folder / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    change(folder, "data", source="jsonl", path="qa.jsonl", media_root=str(REAL), max_frames=4)
    for stage in STAGES:
        run_stage(folder, *stage)
    quality = json.loads((folder / "metrics/quality.json").read_text())
    assert quality["student-nf4"]["questions"] == 3
    page = (folder / "metrics/report.html").read_text()
    assert "How many chairs are around the dining table?" in page
    assert page.count("data:image/webp") == 3 + 1  # with each test question, and what is learnt from


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and its content, params.yaml aside."""
    return {
        str(path.relative_to(folder)): fingerprint_files([path])
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "params.yaml"
    }

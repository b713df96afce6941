"""A stage imports what its work needs: the largest libraries take seconds to import, in each process of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, YAML_SAFE, change, workspace, write_params

LARGE = {
    *("torch", "transformers", "accelerate", "torchvision", "peft", "bitsandbytes", "datasets", "huggingface_hub"),
    *("pandas", "matplotlib", "nltk", "sacrebleu", "av", "pyarrow", "onnx", "onnxscript", "onnxruntime"),
}
MODELS = {"torch", "transformers", "accelerate", "torchvision", "huggingface_hub"}
# The Trainer imports these, whether they are used or not; so does no other part of transformers.
TRAINER = {"peft", "datasets", "pandas", "bitsandbytes"}
# What torch.onnx and the quantizer import.
EXPORTER = {"onnx", "onnxscript", "onnxruntime"}
SCORES = {"pandas", "nltk", "sacrebleu"}


def imported(folder: Path, stage: str, *arguments: str) -> set[str]:
    """What a stage has imported when it is done, in a process of its own."""
    code = f"import sys; from stages.{stage} import run; run(*sys.argv[1:]); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("section", "values", "stage"),
    [
        ("evaluate", {"teacher_methods": []}, ("evaluate", "teacher-int8")),
        ("quantize", {"methods": ["nf4"]}, ("quantize_student", "int8")),
        ("export", {"formats": []}, ("export_student",)),
        ("export", {"teacher": False}, ("export_teacher",)),
        ("finetune_teacher", {"enabled": False}, ("finetune_teacher",)),
        ("train", {"train_vision": True}, ("cache_visual_tokens",)),
    ],
    ids=["evaluate", "quantize_student", "export_student", "export_teacher", "finetune_teacher", "cache_visual_tokens"],
)
def test_what_is_left_out_imports_no_large_library(tmp_path, section, values, stage):
    folder = workspace(tmp_path)
    (folder / "models/teacher").mkdir(parents=True)
    change(folder, section, **values)
    assert imported(folder, *stage) & LARGE == set()


@pytest.mark.system
def test_a_control_that_is_left_out_reads_the_splits_alone(smoke_copy):
    change(smoke_copy, "control", enabled=False)
    assert imported(smoke_copy, "finetune_student") & LARGE == {"pyarrow"}


@pytest.mark.system
@pytest.mark.parametrize(
    ("stage", "needed"),
    [
        (("download_models", "teacher"), MODELS),
        (("build_egoqa_dataset",), {"pyarrow", "av", "huggingface_hub", "pandas"}),
        (("check_inputs",), set()),
        (("finetune_teacher",), MODELS | TRAINER | {"pyarrow"}),
        (("cache_teacher_targets",), MODELS | {"pyarrow"}),
        (("distill",), MODELS | TRAINER | {"pyarrow"}),
        (("quantize_student", "nf4"), MODELS | {"pyarrow", "bitsandbytes"}),
        (("export_student",), MODELS | EXPORTER | {"pyarrow"}),
        (("evaluate", "student-onnx-w4a8"), SCORES | {"pyarrow", "onnxruntime"}),
        (("evaluate", "student-distilled"), MODELS | SCORES | {"pyarrow"}),
        (("evaluate", "student-nf4"), MODELS | SCORES | {"pyarrow", "bitsandbytes"}),
        (("report",), {"pyarrow", "pandas", "matplotlib"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_stage_imports_what_it_needs(smoke_copy, stage, needed):
    assert imported(smoke_copy, *stage) & LARGE <= needed


@pytest.mark.system
def test_a_local_model_is_checked_without_what_makes_or_converts_one(smoke, tmp_path):
    folder = workspace(tmp_path)
    values = YAML_SAFE.load(folder / "params.yaml")
    values["models"]["student"] |= {"source": str(smoke / "models/student"), "init": None}
    write_params(folder, values)
    modules = imported(folder, "download_models", "student")
    assert not modules & {"firstsight.acquisition.initialise", "transformers.models.whisper.modeling_whisper"}
    assert modules & LARGE <= MODELS

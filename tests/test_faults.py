"""Faults of the machine and of training: one line that says what to do, earlier outputs intact, and a rerun works."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, change, run_stage
from torch.utils.data import get_worker_info

from firstsight.core import faults
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_folder
from firstsight.packing.dataset import PackedDataset
from firstsight.records.parquet import Split
from firstsight.training import checkpoints, distillation_model, fit

STUDENT = "models/student-distilled"


@pytest.fixture
def workspace(smoke_copy, monkeypatch):
    monkeypatch.setenv("FIRSTSIGHT_CHECKPOINT_SECONDS", "0")
    return smoke_copy


def spoil(monkeypatch, at: int, how):
    """Have `how` change the loss of the forward pass number `at` of a training."""
    forward, calls = distillation_model.DistillationModel.forward, []

    def spoilt(self, *arguments, **named):
        found = forward(self, *arguments, **named)
        calls.append(self.training)
        if self.training and sum(calls) == at:
            found["loss"] = how(found["loss"])
        return found

    monkeypatch.setattr(distillation_model.DistillationModel, "forward", spoilt)


class NoGradient(torch.autograd.Function):
    """A loss as it should be, whose gradient is none."""

    @staticmethod
    def forward(_context, loss):
        return loss.clone()

    @staticmethod
    def backward(_context, gradient):
        return gradient * float("nan")


@pytest.mark.system
@pytest.mark.parametrize("how", [lambda loss: loss * float("nan"), NoGradient.apply], ids=["loss", "gradient"])
def test_nonsense_stops_the_training_before_it_is_learnt_from(workspace, monkeypatch, how):
    before = fingerprint_folder(workspace / STUDENT)
    with monkeypatch.context() as patched:
        spoil(patched, 3, how)
        with pytest.raises(
            UserError, match=r"expected a finite loss and gradient, found nan at step 3 of 10; lower .* records: "
        ) as error:
            run_stage(workspace, "distill")
    # The records of that step, and no others: what the first epoch's order gives.
    step = torch.randperm(33, generator=torch.Generator().manual_seed(0))[16:24].tolist()
    named = str(error.value).split("records: ")[1].split(", ")
    samples = list(Split(workspace / "data/egoqa/train.parquet"))
    assert named == [record.id for index in step for record in samples[index].records]
    assert fingerprint_folder(workspace / STUDENT) == before
    (kept,) = (one for one in (workspace / ".scratch").iterdir() if one.is_dir())
    assert checkpoints.step_of(checkpoints.latest_usable(kept)) == 2
    run_stage(workspace, "distill")
    assert fingerprint_folder(workspace / STUDENT) == before


@pytest.mark.system
def test_a_loss_that_explodes_stops_the_training(workspace, monkeypatch):
    monkeypatch.setattr(fit, "_LOGGING_STEPS", 1)
    spoil(monkeypatch, 4, lambda loss: loss * 1e4)
    with pytest.raises(UserError, match=r"expected a loss near the first, .*, found .*e\+0\d at step 4 of 10"):
        run_stage(workspace, "distill")


def limit_memory(monkeypatch, samples: int):
    """Memory for so many samples at a time."""
    forward = distillation_model.DistillationModel.forward

    def limited(self, labels, *arguments, **named):
        if len(labels) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, labels, *arguments, **named)

    monkeypatch.setattr(distillation_model.DistillationModel, "forward", limited)


@pytest.mark.system
def test_spent_memory_says_what_to_lower(workspace, monkeypatch):
    limit_memory(monkeypatch, 3)
    with pytest.raises(UserError, match=r"micro-batches of 8, found too little; lower batch_size and raise"):
        run_stage(workspace, "distill")


@pytest.mark.system
@pytest.mark.parametrize("method", ["full", "adalora"])
def test_auto_batch_halves_micro_batches_and_keeps_the_step(workspace, monkeypatch, method):
    change(workspace, "train", batch_size=2, gradient_accumulation_steps=4, method=method)
    run_stage(workspace, "distill")
    expected = fingerprint_folder(workspace / STUDENT)
    change(workspace, "train", batch_size=8, gradient_accumulation_steps=1, auto_batch=True)
    limit_memory(monkeypatch, 3)
    run_stage(workspace, "distill")
    assert fingerprint_folder(workspace / STUDENT) == expected


@pytest.mark.system
@pytest.mark.parametrize("auto_batch", [True, False])
def test_memory_for_not_even_one_sample_says_so(workspace, monkeypatch, auto_batch):
    change(workspace, "train", auto_batch=auto_batch)
    limit_memory(monkeypatch, 0)
    with pytest.raises(UserError, match=f"micro-batches of {1 if auto_batch else 8}, found too little"):
        run_stage(workspace, "distill")


@pytest.mark.system
def test_a_killed_data_worker_is_named(workspace, monkeypatch):
    change(workspace, "runtime", data_workers=1)
    take = PackedDataset.__getitem__

    def deadly(self, index):
        if get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return take(self, index)

    monkeypatch.setattr(PackedDataset, "__getitem__", deadly)
    with pytest.raises(RuntimeError) as error:
        run_stage(workspace, "distill")
    assert faults.in_words(error.value).startswith(
        "data worker: expected it to run to the end, found: DataLoader worker (pid"
    )


def mounted(options: str, place: str, stage: str) -> list[str]:
    """A stage with another file system at a place of the workspace."""
    script = f"mount -t tmpfs -o {options} none {place} && exec {sys.executable} -m stages.{stage}"
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script]


may_mount = shutil.which("unshare") and not subprocess.run(
    ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
).returncode  # fmt: skip


@pytest.mark.system
@pytest.mark.skipif(not may_mount, reason="may not mount a file system of its own")
@pytest.mark.parametrize(
    ("options", "place", "stage", "expected"),
    [
        ("size=64k", ".scratch", "distill", "expected 2."),
        ("size=3M", ".scratch", "distill", "expected space on the file system {place}, found it full ("),
        ("size=64k", ".scratch", "cache_teacher_targets", "MB free on the file system {place}, found 0.1 MB; free"),
        (
            "size=256k",
            ".scratch",
            "build_egoqa_dataset",
            "expected space on the file system {place}, found it full (0.",
        ),
        ("size=8k", "evaluations", "evaluate student", "expected space on the file system {place}, found it full (0."),
        ("size=64k", "models", "quantize_student nf4", "student-distilled"),
        (
            "ro",
            "evaluations",
            "evaluate student",
            "expected a file system that can be written, found {place} read-only",
        ),
        ("ro", ".scratch", "distill", "expected a file system that can be written, found {place} read-only"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(smoke_copy, options, place, stage, expected):
    (smoke_copy / place).mkdir(exist_ok=True)
    before = fingerprint_folder(smoke_copy)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FIRSTSIGHT_CHECKPOINT_SECONDS": "0"}
    run = subprocess.run(
        mounted(options, place, stage), cwd=smoke_copy, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert expected.format(place=smoke_copy / place) in line
    assert "Traceback" not in run.stderr
    assert fingerprint_folder(smoke_copy) == before


def test_a_full_disk_is_recognised_in_every_librarys_words(tmp_path):
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(UserError, match="found it full"), faults.writing(tmp_path):
            raise error
    with pytest.raises(KeyError), faults.writing(tmp_path):
        raise KeyError("no fault of the disk")


def test_a_file_of_another_user_is_one_line(tmp_path):
    error = PermissionError(13, "Permission denied", str(tmp_path))
    assert faults.in_words(error).startswith(f"{tmp_path}: expected permission to use it, found: Permission denied;")

"""Training that is killed and run again ends in the same weights and the same history, bit for bit on the CPU."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, change, run_stage
from transformers.trainer_callback import TrainerCallback

from firstsight.core.errors import Unfinished
from firstsight.core.files import fingerprint_files
from firstsight.distillation import trainer

STAGES = {"finetune_teacher": "models/teacher-finetuned", "distill": "models/student-distilled"}


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


@pytest.fixture
def workspace(smoke_copy, monkeypatch):
    """Checkpoints at every second step; more steps than the smoke run has."""
    monkeypatch.setattr(trainer, "_LOGGING_STEPS", 2)
    monkeypatch.setattr(trainer.Checkpoints.__init__, "__defaults__", (0.0,))
    for section in ("finetune_teacher", "train"):
        change(smoke_copy, section, epochs=2, batch_size=4)
    return smoke_copy


def result(folder, stage):
    output = folder / STAGES[stage]
    return fingerprint_files(sorted(output.glob("*.safetensors"))), json.loads((output / "history.json").read_text())


def interrupt(monkeypatch, at: int, how):
    """Have `how` called after optimizer step `at`."""

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == at:
                how()

    monkeypatch.setattr(trainer, "StopAtNonsense", type("Both", (Interrupt, trainer.StopAtNonsense), {}))


def kill():
    raise Killed


@pytest.mark.parametrize(("stage", "method"), [("finetune_teacher", "full"), ("distill", "full"), ("distill", "lora")])
@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_killed_training_goes_on_and_ends_the_same(workspace, monkeypatch, stage, method, at):
    section = "train" if stage == "distill" else stage
    change(workspace, section, method=method, adapter={**ADAPTER, "dropout": 0.1 if method == "lora" else 0.0})
    run_stage(workspace, stage)
    whole = result(workspace, stage)
    assert whole[1][-1]["step"] >= 16
    assert not list((workspace / ".scratch").iterdir())
    with monkeypatch.context() as patched:
        interrupt(patched, at, kill)
        with pytest.raises(Killed):
            run_stage(workspace, stage)
    assert list((workspace / ".scratch").glob("*/checkpoint-*")) or at == 1
    run_stage(workspace, stage)
    assert result(workspace, stage) == whole
    assert not list((workspace / ".scratch").iterdir())


ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("which", ["train", "data", "targets"])
def test_a_changed_setting_or_input_starts_anew(workspace, monkeypatch, caplog, which):
    with monkeypatch.context() as patched:
        interrupt(patched, 7, kill)
        with pytest.raises(Killed):
            run_stage(workspace, "distill")
    if which == "train":
        change(workspace, "train", temperature=2.5)
    elif which == "data":
        change(workspace, "data", seed=1)
        for stage in ("build_egoqa_dataset", "cache_teacher_targets"):
            run_stage(workspace, stage)
    else:
        change(workspace, "targets", kind="topk", k=8)
        run_stage(workspace, "cache_teacher_targets")
    with caplog.at_level("INFO", logger="firstsight"):
        run_stage(workspace, "distill")
    assert "resuming" not in caplog.text
    interrupted = result(workspace, "distill")
    run_stage(workspace, "distill")
    assert result(workspace, "distill") == interrupted


@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(workspace, monkeypatch, name):
    run_stage(workspace, "distill")
    whole = result(workspace, "distill")
    with monkeypatch.context() as patched:
        interrupt(patched, 7, kill)
        with pytest.raises(Killed):
            run_stage(workspace, "distill")
    (scratch,) = (workspace / ".scratch").glob("distill-*[!k]")
    newest = trainer.newest_checkpoint(scratch)
    content = (newest / name).read_bytes()
    (newest / name).write_bytes(content[: len(content) // 2])
    before = trainer.newest_checkpoint(scratch)
    assert before is not None
    assert before != newest
    run_stage(workspace, "distill")
    assert result(workspace, "distill") == whole


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_that_it_is_unfinished(workspace, monkeypatch, told):
    run_stage(workspace, "distill")
    whole = result(workspace, "distill")
    monkeypatch.setattr(trainer.Checkpoints.__init__, "__defaults__", (3600.0,))
    with monkeypatch.context() as patched:
        interrupt(patched, 3, lambda: os.kill(os.getpid(), told))
        with pytest.raises(Unfinished, match="stopped by a signal after step 4"):
            run_stage(workspace, "distill")
    assert result(workspace, "distill") == whole  # the earlier output is as it was
    (checkpoint,) = (workspace / ".scratch").glob("distill-*/checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    run_stage(workspace, "distill")
    assert result(workspace, "distill") == whole


def test_unfinished_is_one_line_and_status_75():
    code = (
        "from firstsight.core.errors import Unfinished\nfrom firstsight.core.stage import main\n"
        "def run(): raise Unfinished('stopped')\nmain(run)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (75, "unfinished: stopped\n")

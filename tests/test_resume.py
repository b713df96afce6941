"""Training that is killed and run again ends in the same weights and the same history, bit for bit on the CPU."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, change, launch, run_stage

from firstsight.core import scratch
from firstsight.core.errors import Unfinished, UserError
from firstsight.core.files import fingerprint_files, whole_folder
from firstsight.training import checkpoints, fit, trainer

STAGES = {"finetune_teacher": "models/teacher-finetuned", "distill": "models/student-distilled"}
ADAPTER = {"rank": 4, "lora_alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


@pytest.fixture
def workspace(smoke_copy, monkeypatch):
    """A checkpoint at every step; 18 steps of 4 samples in 2 epochs, the last one of each of a single sample."""
    monkeypatch.setattr(fit, "_LOGGING_STEPS", 4)
    monkeypatch.setenv("FIRSTSIGHT_CHECKPOINT_SECONDS", "0")
    for section in ("finetune_teacher", "train"):
        change(smoke_copy, section, epochs=2, batch_size=4)
    return smoke_copy


def result(folder, stage="distill"):
    output = folder / STAGES[stage]
    return fingerprint_files(sorted(output.rglob("*.safetensors"))), (output / "history.json").read_text()


# Results of uninterrupted runs, by stage and settings.
WHOLE = {}


def whole(workspace, stage="distill", **changes):
    key = stage, json.dumps(changes)
    change(workspace, "train" if stage == "distill" else stage, **changes)
    if key not in WHOLE:
        run_stage(workspace, stage)
        WHOLE[key] = result(workspace, stage)
        assert not list((workspace / ".scratch").iterdir())
    return WHOLE[key]


def interrupted(monkeypatch, workspace, at: int, stage="distill", how=None) -> Path:
    """Kill the stage, or do `how`, before optimizer step `at` + 1; its scratch folder."""

    class Interrupt(checkpoints.CheckpointCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == at:
                (how or kill)()

    with monkeypatch.context() as patched:
        patched.setattr(fit, "CheckpointCallback", Interrupt)
        with pytest.raises((Killed, Unfinished)):
            run_stage(workspace, stage)
    (folder,) = (one for one in (workspace / ".scratch").iterdir() if one.is_dir())
    return folder


def kill():
    raise Killed


@pytest.mark.system
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("finetune_teacher", {}),
        ("distill", {}),
        ("distill", {"gradient_accumulation_steps": 2}),
        ("distill", {"method": "lora", "adapter": ADAPTER}),
        ("distill", {"method": "adalora", "adapter": ADAPTER}),
        ("distill", {"optimizer": "adamw_8bit"}),
        # The first epoch stays the best, so that the training stops early.
        ("distill", {"learning_rate": 0.3, "epochs": 4, "warmup_fraction": 0.0, "early_stopping_epochs": 2}),
    ],
    ids=["teacher", "student", "accumulation", "lora", "adalora", "adamw_8bit", "stopping-early"],
)
def test_a_killed_training_goes_on_and_ends_the_same(workspace, monkeypatch, caplog, stage, changes):
    expected = whole(workspace, stage, **changes)
    steps = json.loads(expected[1])[-1]["step"]
    # Within the first epoch, at its end, within the second; one run is killed again and again.
    for at in (2, steps // 2, steps - 3):
        kept = interrupted(monkeypatch, workspace, at, stage)
        assert checkpoints.step_of(checkpoints.latest_usable(kept)) == at
        assert len(list(kept.iterdir())) <= 3
    with caplog.at_level("INFO", logger="firstsight"):
        run_stage(workspace, stage)
    assert f"resuming from step {steps - 3} of " in caplog.text
    assert result(workspace, stage) == expected
    assert not list((workspace / ".scratch").iterdir())


@pytest.mark.system
def test_a_training_killed_after_its_last_step_is_not_trained_further(workspace, monkeypatch):
    stopping_early = {"learning_rate": 0.3, "epochs": 4, "warmup_fraction": 0.0, "early_stopping_epochs": 2}
    expected = whole(workspace, **stopping_early)
    with monkeypatch.context() as patched:
        patched.setattr(trainer.DistillationTrainer, "load_weights", lambda *_: kill())
        with pytest.raises(Killed):
            run_stage(workspace, "distill")
    with monkeypatch.context() as patched:
        patched.setattr(trainer.DistillationTrainer, "training_step", lambda *_, **__: kill())
        run_stage(workspace, "distill")
    assert result(workspace) == expected


@pytest.mark.system
@pytest.mark.parametrize("which", ["parameter", "data", "model", "code"])
def test_a_changed_setting_or_input_starts_anew(workspace, monkeypatch, caplog, which):
    interrupted(monkeypatch, workspace, 7)
    if which == "parameter":
        change(workspace, "train", temperature=2.5)
    elif which == "data":
        change(workspace, "data", seed=1)
        for stage in ("build_egoqa_dataset", "cache_teacher_targets"):
            run_stage(workspace, stage)
    elif which == "model":
        path = workspace / "models/student/chat_template.jinja"
        path.write_text("{# changed #}" + path.read_text())
    else:
        monkeypatch.setattr("firstsight.core.scratch._code", lambda: {"files": "edited"})
    begun = []

    class First(checkpoints.CheckpointCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)
            kill()

    monkeypatch.setattr(fit, "CheckpointCallback", First)
    with caplog.at_level("INFO", logger="firstsight"), pytest.raises(Killed):
        run_stage(workspace, "distill")
    assert begun == [0]
    assert "resuming" not in caplog.text


@pytest.mark.system
@pytest.mark.parametrize("name", ["optimizer.pt", "trained.safetensors", "trainer_state.json", "checkpoint.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(workspace, monkeypatch, caplog, name):
    expected = whole(workspace)
    kept = interrupted(monkeypatch, workspace, 12)
    path = kept / "checkpoint-12" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with caplog.at_level("INFO", logger="firstsight"):
        run_stage(workspace, "distill")
    assert "checkpoint-12 cannot be used" in caplog.text
    assert "resuming from step 11 of 18" in caplog.text
    assert result(workspace) == expected


@pytest.mark.system
def test_a_kill_while_a_checkpoint_is_written_costs_that_checkpoint_alone(workspace, monkeypatch, caplog):
    expected = whole(workspace)
    mark_complete = checkpoints.mark_complete
    with monkeypatch.context() as patched:
        patched.setattr(
            checkpoints, "mark_complete", lambda path: kill() if path.name == "checkpoint-5" else mark_complete(path)
        )
        with pytest.raises(Killed):
            run_stage(workspace, "distill")
    with caplog.at_level("INFO", logger="firstsight"):
        run_stage(workspace, "distill")
    assert "checkpoint-5 is incomplete" in caplog.text
    assert "resuming from step 4 of 18" in caplog.text
    assert result(workspace) == expected


@pytest.mark.system
def test_where_the_best_epochs_weights_are_damaged_training_goes_on_from_before_them(workspace, monkeypatch, caplog):
    expected = whole(workspace)
    kept = interrupted(monkeypatch, workspace, 12)
    (kept / "checkpoint-9/trained.safetensors").write_bytes(b"")
    with caplog.at_level("INFO", logger="firstsight"):
        run_stage(workspace, "distill")
    assert "checkpoint-9/trained.safetensors is damaged" in caplog.text
    assert "resuming" not in caplog.text
    assert result(workspace) == expected


@pytest.mark.system
def test_a_repository_that_was_moved_goes_on(workspace, monkeypatch):
    expected = whole(workspace)
    interrupted(monkeypatch, workspace, 17)
    moved = workspace.rename(workspace.with_name("moved"))
    run_stage(moved, "distill")
    assert result(moved) == expected


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.system
def test_a_pickle_in_a_checkpoint_is_not_executed(workspace, monkeypatch):
    kept = interrupted(monkeypatch, workspace, 3)
    good = workspace / "good"
    shutil.copytree(kept, good)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        for write in (lambda path: path.write_bytes(pickle.dumps(Malicious(), 2)), partial(torch.save, Malicious())):
            shutil.rmtree(kept)
            shutil.copytree(good, kept)
            write(kept / "checkpoint-3" / name)
            checkpoints.mark_complete(kept / "checkpoint-3")
            with pytest.raises(UserError, match=r"checkpoint-3: expected a checkpoint of tensors and .*clean-scratch"):
                run_stage(workspace, "distill")
            assert not (workspace / "executed").exists()


@pytest.mark.system
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_says_that_it_is_unfinished(workspace, monkeypatch, told):
    expected = whole(workspace)
    before = result(workspace)
    monkeypatch.setenv("FIRSTSIGHT_CHECKPOINT_SECONDS", "3600")
    for at in (3, 8):  # within an epoch, and in its last step
        kept = interrupted(monkeypatch, workspace, at, how=lambda: os.kill(os.getpid(), told))
        assert checkpoints.step_of(checkpoints.latest_usable(kept)) == at + 1
    assert result(workspace) == before  # the earlier output is as it was
    run_stage(workspace, "distill")
    assert result(workspace) == expected


@pytest.mark.system
def test_unfinished_is_one_line_and_status_75():
    code = (
        "from firstsight.core.errors import Unfinished\nfrom firstsight.core.stage import main\n"
        "def run(): raise Unfinished('stopped')\nmain(run)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (75, "unfinished: stopped\n")


@pytest.mark.system
def test_two_at_the_same_work_one_waits_and_then_says_why(workspace, monkeypatch):
    """The other works on as if alone."""
    expected = whole(workspace)
    monkeypatch.setattr(scratch, "_PATIENCE", 0.2)

    def begin_another():
        with pytest.raises(UserError, match="expected no other process at this work, found one"):
            run_stage(workspace, "distill")

    monkeypatch.setattr(checkpoints.CheckpointCallback, "on_train_begin", lambda *_, **__: begin_another())
    run_stage(workspace, "distill")
    assert result(workspace) == expected


def test_cleaning_leaves_a_folder_that_is_at_work(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTSIGHT_SCRATCH", str(tmp_path))
    with pytest.raises(Killed), scratch.kept_folder("distill", {"seed": 0}) as left:
        (left / "checkpoint").write_text("")
        raise Killed
    with scratch.kept_folder("distill", {"seed": 1}) as at_work:
        (at_work / "checkpoint").write_text("")
        scratch.clean()
        assert (at_work / "checkpoint").exists()
    assert not list(tmp_path.iterdir())


def test_another_setting_at_work_may_remove_its_files_as_they_are_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FIRSTSIGHT_SCRATCH", str(tmp_path))
    checkpoint = tmp_path / "distill-other/checkpoint-1"
    checkpoint.mkdir(parents=True)
    (tmp_path / "distill-other/kept").write_bytes(bytes(200_000))
    list_folder = os.scandir

    def gone(path="."):
        if str(path) == str(checkpoint):
            raise FileNotFoundError
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", gone)
    with caplog.at_level("INFO", logger="firstsight"), scratch.kept_folder("distill", {}):
        pass
    assert "1 other unfinished runs, 0.2 MB" in caplog.text


@pytest.mark.slow
@pytest.mark.system
def test_several_processes_go_on_and_end_the_same(workspace):
    """Told to end by a signal, and killed, in an epoch after the first."""
    change(workspace, "train", gradient_accumulation_steps=2, epochs=3)
    program = workspace / "interrupted.py"
    program.write_text(INTERRUPTED)
    results, text = [], ""
    for moments in ("", "7 11k"):
        for moment in [*moments.split(), "never"]:
            done = launch(workspace, 2, str(program), moment)
            assert (done.returncode == 0) == (moment == "never"), done.stderr[-3000:]
            text += done.stderr
        results.append(result(workspace))
    assert results[0] == results[1]
    assert "resuming from step 8 of 15" in text
    assert "resuming from step 11 of 15" in text
    assert not list((workspace / ".scratch").iterdir())


INTERRUPTED = """
import os, signal, sys
from firstsight.core.stage import main
from firstsight.training import checkpoints, fit
from stages import distill

moment = sys.argv[1]
fit._LOGGING_STEPS = 4

class Interrupt(checkpoints.CheckpointCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if moment.rstrip("k") == str(state.global_step):
            os.kill(os.getpid(), signal.SIGKILL if moment.endswith("k") else signal.SIGTERM)

fit.CheckpointCallback = Interrupt
main(distill.run)
"""


def test_what_a_killed_process_left_of_an_output_is_removed_and_a_living_ones_stays(tmp_path):
    output = tmp_path / "output"
    left = tmp_path / ".output.killed.partial"
    left.mkdir()
    with whole_folder(output) as first:
        assert not left.exists()
        with whole_folder(output) as second:
            assert first.exists()
            (second / "made").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["output"]

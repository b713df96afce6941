"""Progress is a bar on a terminal alone; a log file gets a few complete lines."""

import os
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT, workspace

from firstsight.core import progress as module
from firstsight.core.progress import progress

DURATION = r"\d\d:\d\d"


def line(label: str, done: int, total: int, unit: str) -> str:
    return rf"{label}: {done}/{total} {unit}, {DURATION} elapsed, ({DURATION}|\?) remaining"


def printed(folder: Path, stage: str, *arguments: str) -> str:
    """What a stage says to a pipe."""
    words, environment = [sys.executable, "-m", f"stages.{stage}", *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    return done.stderr.decode()


def test_a_line_at_most_every_ten_seconds_and_one_at_the_end(capsys):
    assert module._INTERVAL == 10
    for _ in progress(range(50), desc="counting", unit="numbers", total=50):
        time.sleep(0.001)
    assert re.fullmatch(line("counting", 50, 50, "numbers") + "\n", capsys.readouterr().err)


def test_lines_come_at_intervals(capsys, monkeypatch):
    monkeypatch.setattr(module, "_INTERVAL", 0.5)
    started = time.monotonic()
    with progress(desc="counting", unit="numbers", total=400, initial=200) as shown:
        for _ in range(200):
            time.sleep(0.01)
            shown.update(1)
    most = (time.monotonic() - started) / 0.5
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= most + 1
    done = [int(re.fullmatch(line("counting", r"(\d+)", 400, "numbers"), one)[1]) for one in lines]
    assert done == sorted(done)
    assert done[0] > 200
    assert done[-1] == 400


def test_an_interruption_says_how_far_it_was(capsys):
    with pytest.raises(ValueError, match="stop"), progress(desc="counting", unit="numbers", total=9) as shown:
        shown.update(4)
        raise ValueError("stop")
    assert re.fullmatch(line("counting", 4, 9, "numbers") + "\n", capsys.readouterr().err)


def test_where_nothing_is_left_to_do_nothing_is_said(capsys):
    assert list(progress([], desc="counting", unit="numbers", total=3, initial=3)) == []
    assert capsys.readouterr().err == ""


def test_of_several_processes_the_main_one_shows_it_alone(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert list(progress(range(3), desc="counting", unit="numbers", total=3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.system
def test_a_stage_on_a_terminal_shows_a_bar(tmp_path):
    folder = workspace(tmp_path)
    outside, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, 100))
    words, environment = [sys.executable, "-m", "stages.build_egoqa_dataset"], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=folder, env=environment, stderr=inside) as stage:
        os.close(inside)
        shown = b""
        while chunk := read(outside):
            shown += chunk
    assert stage.returncode == 0
    assert re.search(rb"\rbuild-egoqa-dataset: media: 100%\|\S+\| 48/48 \[", shown)


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # all that write to it have ended
        return b""


@pytest.mark.system
def test_a_data_set_is_built_with_one_line_of_progress(tmp_path):
    lines = printed(workspace(tmp_path), "build_egoqa_dataset").splitlines()
    assert re.fullmatch(line("build-egoqa-dataset: media", 48, 48, "media"), lines[0])
    assert [one.split(":")[0] for one in lines[1:]] == ["wrote data/egoqa", "left out"]


@pytest.mark.system
@pytest.mark.parametrize(
    ("stage", "labels"),
    [
        (("cache_teacher_targets",), ["cache-teacher-targets: train", "cache-teacher-targets: validation"]),
        (("distill",), ["training"]),
        (("quantize_student", "nf4"), ["quantize-student: errors"]),
        (("evaluate", "student-nf4"), ["evaluate student-nf4"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_stage_says_to_a_log_file_what_it_has_done(smoke_copy, stage, labels):
    text = printed(smoke_copy, *stage)
    assert "\r" not in text
    assert "\x1b" not in text
    last = dict(re.findall(r"^(.+): (\d+/\d+) [a-z]+, \S+ elapsed, \S+ remaining$", text, re.MULTILINE))
    assert list(last) == labels
    assert all(done.split("/")[0] == done.split("/")[1] for done in last.values())
    assert len(text.splitlines()) < 20


@pytest.mark.system
def test_each_validation_is_a_line_of_the_log(smoke_copy):
    text = printed(smoke_copy, "finetune_teacher")
    assert re.search(r"^epoch 1: validation objective \d+\.\d+, ce \d+\.\d+$", text, re.MULTILINE)

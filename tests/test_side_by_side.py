"""`firstsight repro`: stages of a real DVC that run side by side."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from conftest import ROOT, command, stages_run

from firstsight.running import side_by_side
from firstsight.running.side_by_side import _out_of_date, _waiting

pytestmark = pytest.mark.system

# Each stage writes its cores and when it began and ended. Those that meet end when both have begun; a stage with a
# file fail-NAME fails. Told to end, each says so in a file.
STAGE = """
import json, os, signal, sys, time
from pathlib import Path
from firstsight.core.launchers import end_with_launchers

name, *others = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(Path(f"{name}.told").touch()))
end_with_launchers()
began = time.time()
Path(f"{name}.began").touch()
print(f"{name} has begun", flush=True)
deadline = time.monotonic() + 60
while not all(Path(f"{other}.began").exists() for other in others):
    assert time.monotonic() < deadline, f"{name} is alone"
    time.sleep(0.05)
if Path(f"fail-{name}").exists():
    sys.exit("error: told to fail")
used = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
Path(f"{name}.json").write_text(json.dumps({"began": began, "ended": time.time(), "cores": used}))
"""
NAMES = ("first", "second", "third", "evaluate@a", "evaluate@b", "report")
PIPELINE = """
stages:
  first: {cmd: python stage.py first second, deps: [stage.py], outs: [first.json]}
  second: {cmd: python stage.py second first, deps: [stage.py], outs: [second.json]}
  third: {cmd: python stage.py third, deps: [first.json, second.json], outs: [third.json]}
  evaluate:
    foreach: [a, b]
    do: {cmd: "python stage.py evaluate@${item}", deps: [first.json], outs: ["evaluate@${item}.json"]}
  report: {cmd: python stage.py report, deps: [evaluate@a.json, evaluate@b.json], outs: [report.json]}
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    command(tmp_path, "dvc", "init", "--no-scm", "--quiet")
    return tmp_path


def as_from_a_terminal() -> None:
    """Undo what the child would inherit from the tests: few cores of a worker, and interrupts that are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


def started(project, *options: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "firstsight", "repro", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"env": env, "text": True, "start_new_session": True, "preexec_fn": as_from_a_terminal}
    return subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def finished(process: subprocess.Popen) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def test_stages_that_do_not_depend_on_each_other_run_side_by_side_and_what_measures_alone(project):
    status, printed = finished(started(project, "--jobs", "2"))
    assert status == 0, printed
    assert sorted(re.findall(r"Running stage '([^']+)'", printed)) == sorted(NAMES)
    assert re.search(r"^first  \| first has begun$", printed, re.MULTILINE)
    done = {name: json.loads((project / f"{name}.json").read_text()) for name in NAMES}
    together = ("first", "second")
    assert max(done[name]["began"] for name in together) < min(done[name]["ended"] for name in together)
    assert done["third"]["began"] > max(done[name]["ended"] for name in together)
    if len(done["report"]["cores"]) > 1:
        used = [set(done[name]["cores"]) for name in together]
        assert not used[0] & used[1]
        assert len(used[0]) == len(used[1]) < len(done["report"]["cores"])
    alone = sorted((done[name] for name in NAMES[2:]), key=lambda one: one["began"])
    assert all(one["ended"] < other["began"] for one, other in pairwise(alone))
    assert json.loads(command(project, "dvc", "status", "--json")) == {}
    assert stages_run(project, "repro") == set()
    assert "Running stage" not in finished(started(project, "--jobs", "2"))[1]


def test_after_a_failure_what_runs_ends_and_nothing_is_begun(project):
    (project / "fail-first").touch()
    status, printed = finished(started(project, "--jobs", "2"))
    assert status == 1
    assert "first  | error: told to fail" in printed
    assert printed.splitlines()[-1] == "error: first: expected it to run to its end, found it failed, as it says above"
    assert (project / "second.json").exists()
    assert not (project / "third.began").exists()
    (project / "fail-first").unlink()
    status, printed = finished(started(project, "--jobs", "2"))
    assert (status, "Running stage 'second'" in printed) == (0, False), printed


def begun_without_end(project, jobs: str) -> subprocess.Popen:
    """The command, at work on a stage that waits for a minute."""
    pipeline = PIPELINE.replace("first second,", "first,").replace("second first,", "second never,")
    (project / "dvc.yaml").write_text(pipeline)
    process = started(project, "--jobs", jobs)
    wait_for(project / "second.began")
    return process


def wait_for(path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_when_it_is_ended_its_stages_are_told(project, number, jobs):
    process = begun_without_end(project, jobs)
    process.send_signal(number)
    wait_for(project / "second.told", 20)
    status, printed = finished(process)
    assert status in (-number, 128 + number), printed
    assert not (project / "third.began").exists()


def test_an_interrupt_from_the_keyboard_is_one_line(project):
    process = begun_without_end(project, "2")
    os.killpg(process.pid, signal.SIGINT)
    status, printed = finished(process)
    assert (status, printed.splitlines()[-1]) == (130, "interrupted; run it again to resume")
    assert not (project / "third.began").exists()


def test_one_job_is_dvc_repro(project):
    (project / "dvc.yaml").write_text(PIPELINE.replace("second first,", "second,").replace("first second,", "first,"))
    status, printed = finished(started(project, "--jobs", "1"))
    assert status == 0, printed
    assert "| " not in printed
    done = sorted((json.loads((project / f"{name}.json").read_text()) for name in NAMES), key=lambda one: one["began"])
    assert all(one["ended"] < other["began"] for one, other in pairwise(done))


@pytest.mark.parametrize(
    ("bound", "usable", "jobs", "sizes"),
    [(2, 2, 2, [1, 1]), (3, 3, 2, [1, 1]), (8, 8, 2, [4, 4]), (64, 2, 2, [1, 1]), (1, 1, 2, [0, 0])],
)
def test_each_job_has_as_many_cores_as_the_others_and_of_its_own(monkeypatch, bound, usable, jobs, sizes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    monkeypatch.setattr(side_by_side, "cores", lambda: usable)
    shares = side_by_side._shares(jobs)
    assert [len(share) for share in shares] == sizes
    assert len(set().union(*shares)) == sum(sizes)


def test_only_what_has_changed_and_what_reads_it_runs_and_what_most_wait_for_first():
    dependencies = {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"a"}, "evaluate@x": {"c"}, "report": {"evaluate@x"}}
    assert _out_of_date(dependencies, {"b": []}) == {"b": set(), "c": {"b"}}
    assert _out_of_date(dependencies, {"evaluate@x": []}) == {}
    assert _out_of_date(dependencies | {"last": {"report"}}, {"last": []}) == {}
    assert _waiting({name: dependencies[name] for name in "abcd"}) == {"a": 3, "b": 1, "c": 0, "d": 0}

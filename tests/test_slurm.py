"""The scripts of slurm/ under a real Slurm of one node or two, which the tests start themselves."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import QUANTIZATIONS, ROOT, command, stages_run, warm
from warm import PYTHON

from firstsight.core.cores import cores
from slurm.set_params import set_params

pytestmark = [pytest.mark.system, pytest.mark.slow]

# What the tests' user writes into slurm/site.sh: the node has no GPU, and the environment is there already.
SITE = """
unset SBATCH_GPUS_PER_NODE SBATCH_CPUS_PER_GPU
export SBATCH_TIMELIMIT=1:00:00
export FIRSTSIGHT_SCRATCH={scratch}
export PATH={environment}:$PATH
"""
PIPELINE = """
stages:
  count:
    cmd: accelerate launch --quiet --cpu --mixed_precision no --dynamo_backend no -m stages.count
    deps: [stages/count.py]
    params: [count]
    outs: [counted.json]
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if missing := slurm_cluster.missing():
        pytest.skip(f"no {', '.join(missing)}: install slurm-wlm and munge, or run `make test-all` as root on Debian")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def two_nodes(tmp_path_factory):
    if missing := slurm_cluster.missing():
        pytest.skip(f"no {', '.join(missing)}")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), ("node1", "node2")) as cluster:
        yield cluster


@pytest.fixture
def counting(slurm, tmp_path) -> Path:
    """A project of one stage that counts, and is told to end as the stages that train are."""
    project = tmp_path / "counting"
    (project / "stages").mkdir(parents=True)
    (tmp_path / "scratch").mkdir()
    shutil.copytree(ROOT / "slurm", project / "slurm")
    shutil.copy(ROOT / "tests/data/counting_stage.py", project / "stages/count.py")
    (project / "dvc.yaml").write_text(PIPELINE)
    site(project, tmp_path / "scratch")
    slurm.run("git", "init", "--quiet", cwd=project)
    slurm.run("dvc", "init", "--quiet", cwd=project)
    return project


def site(project: Path, scratch: Path, environment: Path | str = Path(sys.executable).parent) -> None:
    with (project / "slurm/site.sh").open("a") as file:
        file.write(SITE.format(scratch=scratch, environment=environment))


def submit(
    slurm, project: Path, to: int, *options: str, data_workers: int = 0, seconds_to_save: int = 1, **variables: str
) -> str:
    """Queue slurm/repro.sbatch, as the README says, with a preset that counts so far; the job's number."""
    values = f"{{to: {to}, data_workers: {data_workers}, seconds_to_save: {seconds_to_save}}}"
    (project / "preset.yaml").write_text(f"count: {values}\n")
    command = f"source slurm/site.sh && sbatch --parsable {' '.join(options)} slurm/repro.sbatch preset.yaml"
    return slurm.run("bash", "-c", command, cwd=project, **variables).strip()


def wait_for(log: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else f"no {log}"
        time.sleep(0.1)


def assert_counted_on(project: Path, to: int, starts: int) -> None:
    """Every number once, over so many starts, and every start did some."""
    counted = json.loads((project / "counted.json").read_text())
    assert [number for start in counted for number in start] == list(range(to))
    assert len(counted) == starts
    assert all(counted)


def test_a_job_whose_time_is_nearly_up_saves_queues_itself_and_goes_on(slurm, counting):
    job = submit(slurm, counting, 200, data_workers=1, HF_TOKEN="hf_secret")
    log = counting / f"slurm-{job}.out"
    wait_for(log, "counted 5\n")
    # In minutes. The job wants to be told at five; Slurm looks every half minute, and the counting takes longer.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=4")
    slurm.wait(job, "PENDING")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    state = slurm.wait(job, "COMPLETED", "FAILED")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert_counted_on(counting, 200, starts=2)
    text = log.read_text()
    assert text.count("Running stage 'count'") == 2
    assert text.count("telling process") == 1
    assert "hf_secret" not in text


def test_a_preempted_job_saves_and_goes_on_where_it_was(slurm, counting):
    """Preempting tells every process of the job at once: DVC is gone before the stage has saved."""
    job = submit(slurm, counting, 40, "--partition=usual", seconds_to_save=6)
    wait_for(counting / f"slurm-{job}.out", "counted 5\n")
    # Urgent until the test has done what follows: the preempted job does not begin again before.
    urgent_work = "until [ -e released ]; do sleep 0.2; done"
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--ntasks=2", f"--wrap={urgent_work}", cwd=counting
    ).strip()
    slurm.wait(job, "PENDING")
    assert (counting.parent / "scratch/counted.json").exists()
    # As if the job went on at a node where DVC's old process number is another process.
    held = {str(counting / "counted.json"): {"pid": os.getpid(), "cmd": "dvc repro"}}
    (counting / ".dvc/tmp/rwlock").write_text(json.dumps({"write": held}))
    (counting / "released").touch()
    state = slurm.wait(job, "COMPLETED", "FAILED")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), (counting / f"slurm-{job}.out").read_text()
    assert slurm.state(urgent)["JobState"] == "COMPLETED"
    assert_counted_on(counting, 40, starts=2)


def test_a_job_that_fails_is_not_queued_again(slurm, counting):
    job = submit(slurm, counting, -1)
    state = slurm.wait(job, "COMPLETED", "FAILED")
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0")
    assert "expected a number to count to" in (counting / f"slurm-{job}.out").read_text()


SHARING = """
stages:
  share:
    cmd: python -m stages.share
    deps: [stages/share.py]
    params: [share]
    outs: [shared.json]
"""


def sharing(cluster, folder: Path, to: int) -> tuple[Path, str]:
    """A project of one stage that processes share, at work as a job of two nodes; and the job's number."""
    project = folder / "sharing"
    (project / "stages").mkdir(parents=True)
    (project / "stages/__init__.py").touch()
    (folder / "scratch").mkdir()
    shutil.copytree(ROOT / "slurm", project / "slurm")
    shutil.copytree(ROOT / "firstsight", project / "firstsight")
    shutil.copy(ROOT / "tests/data/sharing_stage.py", project / "stages/share.py")
    (project / "dvc.yaml").write_text(SHARING)
    (project / "preset.yaml").write_text(f"share: {{to: {to}}}\n")
    site(project, folder / "scratch")
    cluster.run("git", "init", "--quiet", cwd=project)
    cluster.run("dvc", "init", "--quiet", cwd=project)
    command = "source slurm/site.sh && sbatch --parsable --nodes 2 slurm/repro.sbatch preset.yaml"
    return project, cluster.run("bash", "-c", command, cwd=project).strip()


def assert_shared(project: Path, to: int) -> list[tuple[int, str, str]]:
    """Every number once, and each node did some of them; the numbers with their nodes and starts."""
    done = json.loads((project / "shared.json").read_text())
    assert [number for number, _, _ in done] == list(range(to))
    assert {node for _, node, _ in done} == {"node1", "node2"}
    return done


def test_a_job_of_several_nodes_uses_them_all(two_nodes, tmp_path):
    project, job = sharing(two_nodes, tmp_path, 40)
    state = two_nodes.wait(job, "COMPLETED", "FAILED", seconds=900)
    log = (project / f"slurm-{job}.out").read_text()
    assert state["JobState"] == "COMPLETED", log
    assert_shared(project, 40)
    assert log.count("running on the CPU") == 1
    assert f"{cores()} threads, in 2 processes" in log  # one on each node


def test_a_job_whose_node_dies_goes_on_when_there_is_another(two_nodes, tmp_path):
    project, job = sharing(two_nodes, tmp_path, 400)
    wait_for(project / "begun-node2", "101\n", seconds=900)
    two_nodes.kill("node2", project)
    state = two_nodes.wait(job, "PENDING", "COMPLETED", "FAILED", seconds=120)
    log = project / f"slurm-{job}.out"
    assert state["JobState"] == "PENDING", log.read_text()
    assert not (project / "shared.json").exists()
    with two_nodes.restarted("node2"):
        state = two_nodes.wait(job, "COMPLETED", "FAILED", seconds=900)
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log.read_text()
        done = assert_shared(project, 400)
    assert sum(start == "0" for _, _, start in done) >= 80  # what was kept was not done again
    assert {start for _, _, start in done} == {"0", "1"}


def test_a_sweep_runs_a_job_a_point_and_its_experiments_arrive_here(slurm, committed, tmp_path):
    project = tmp_path / "project"
    command(tmp_path, "git", "clone", "--quiet", str(committed), str(project))
    command(project, "dvc", "cache", "dir", "--local", str(committed / ".dvc/cache"))
    # How a job's Python starts makes no difference here. Where it is, site.sh says.
    variables = {name: value for name, value in warm().items() if name != "PATH"}
    python = [str(Path(one).parent) for one in (*variables.get(PYTHON, "").split(), sys.executable)]
    site(project, tmp_path / "scratch", ":".join(python))
    command(
        project, "git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qam", "this cluster"
    )
    grid = "evaluate.seed=0", "quantize.double_quantization=true,false"
    slurm.run("bash", "slurm/sweep.sh", *grid, cwd=project, **variables)
    jobs = slurm.run("squeue", "--noheader", "--format=%i").split()
    assert len(jobs) == 2
    for job in jobs:
        state = slurm.wait(job, "COMPLETED", "FAILED", seconds=400)
        log = (project / f"slurm-{job}.out").read_text()
        assert state["JobState"] == "COMPLETED", log
        # All else comes from the cache they share.
        ran = set(re.findall(r"Running stage '([^']+)'", log))
        assert ran <= QUANTIZATIONS | {"evaluate@student-nf4", "report"}
    shown = subprocess.run(["dvc", "exp", "show", "--csv"], cwd=project, capture_output=True, text=True, check=True)
    rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(shown.stdout))}
    for doubly in ("true", "false"):
        row = rows[f"evaluate.seed-0_quantize.double_quantization-{doubly}"]
        assert row["quantize.double_quantization"].lower() == doubly
        assert float(row["nf4.exact_match"]) >= 0
    command(project, "dvc", "exp", "apply", "evaluate.seed-0_quantize.double_quantization-false")
    assert stages_run(project, "repro") == set()
    config = json.loads((project / "models/student-nf4/config.json").read_text())
    assert not config["quantization_config"]["bnb_4bit_use_double_quant"]


@pytest.fixture
def submitting(tmp_path) -> Path:
    """A committed project from which slurm/sweep.sh can be called, as far as submitting."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copytree(ROOT / "slurm", project / "slurm")
    shutil.copy(ROOT / "presets/smoke.yaml", project / "params.yaml")
    (project / "firstsight").symlink_to(ROOT / "firstsight")
    site(project, tmp_path / "scratch")
    command(project, "git", "init", "--quiet")
    command(project, "git", "config", "user.name", "test")
    command(project, "git", "config", "user.email", "test@example.org")
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", "all")
    return project


@pytest.mark.parametrize(
    ("arguments", "edited", "line"),
    [
        ([], False, "error: expected parameters, such as train.temperature=1.5,2,4"),
        (["train.alpha=0.5"], True, "error: expected everything committed"),
        (["train.alpah=0.5"], False, "error: train.alpah=0.5: expected KEY=VALUE with a key of params.yaml"),
        (["train.alpha=0.5,2"], False, "train.alpha: expected at most 1"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line_before_anything_is_submitted(
    submitting, tmp_path, arguments, edited, line
):
    if edited:
        (submitting / "params.yaml").write_text((submitting / "params.yaml").read_text() + "# edited\n")
    words = ["bash", "slurm/sweep.sh", *arguments]
    done = subprocess.run(words, cwd=submitting, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "scratch").exists()


def test_parameters_are_set_and_comments_kept(tmp_path):
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "presets/smoke.yaml", path)
    set_params(path, ["train.temperature=2", "models.student.revision=main"])
    before = (ROOT / "presets/smoke.yaml").read_text().splitlines()
    after = path.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    comment = " # teacher's and student's logits are divided by it before they are compared"
    assert changed == [
        ("    revision: null", "    revision: main"),
        (f"  temperature: 3.0{comment}", f"  temperature: 2  {comment}"),
    ]


def test_setup_asks_conda_for_python_where_it_is_too_old_and_puts_the_cache_in_scratch(tmp_path):
    project, scratch, old = tmp_path / "project", tmp_path / "scratch", tmp_path / "old"
    shutil.copytree(ROOT / "slurm", project / "slurm")
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, project / name)
    command(project, "git", "init", "--quiet")
    command(project, "dvc", "init", "--quiet")
    old.mkdir()
    # The environment is as if it had been made before: nothing is installed.
    (scratch / "venv/bin").mkdir(parents=True)
    checksum = subprocess.run(["cksum", "requirements.txt"], cwd=project, capture_output=True, text=True, check=True)
    (scratch / f"venv/.ready-{checksum.stdout.split()[0]}").touch()
    for name, does in (("python3", "exit 1"), ("conda", f'echo "$@" > {tmp_path}/conda'), ("dvc", 'exec "$DVC" "$@"')):
        (old / name).write_text(f"#!/bin/sh\n{does}\n")
        (old / name).chmod(0o755)
    site(project, scratch, old)
    command(project, "bash", "slurm/setup.sh", DVC=shutil.which("dvc"))
    assert (tmp_path / "conda").read_text() == f"create --quiet --yes --prefix {scratch}/python python=3.11\n"
    assert command(project, "dvc", "cache", "dir").strip() == str(scratch / "dvc-cache")

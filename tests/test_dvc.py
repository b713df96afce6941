"""What real DVC reruns after a change, and what it leaves alone. Drives `dvc` on a copy of the repository."""

import csv
import io
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, YAML_SAFE, write_params

from firstsight.evaluation.variants import METHODS, VARIANTS
from firstsight.models.initialise import initialise

pytestmark = pytest.mark.slow

EVALUATIONS = {f"evaluate@{variant}" for variant in VARIANTS}
QUANTISATIONS = {f"quantize-student@{method}" for method in METHODS}
AFTER_DISTILL = QUANTISATIONS | {"evaluate@student-distilled", "evaluate@student-nf4", "report"}
ALL = EVALUATIONS | AFTER_DISTILL | {
    "download-models@teacher",
    "download-models@student",
    "build-egoqa-dataset",
    "finetune-teacher",
    "cache-teacher-targets",
    "distill",
}  # fmt: skip


def command(project: Path, *words: str, **variables: str) -> str:
    """Run a command in the project, with variables of the environment, and return what it printed."""
    env = os.environ | variables
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stages_run(project: Path, *words: str, **variables: str) -> set[str]:
    """The stages that a dvc command ran."""
    return set(re.findall(r"Running stage '([^']+)'", command(project, "dvc", *words, **variables)))


def new_project(project: Path) -> Path:
    """A clone whose params.yaml is the smoke preset, before anything has been run."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".scratch", "cache", "tmp", "config.local", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, project, ignore=ignored)
    for output in ("data/egoqa", "data/teacher-targets", "models", "evaluations", "metrics"):
        shutil.rmtree(project / output, ignore_errors=True)
    (project / "dvc.lock").unlink(missing_ok=True)
    shutil.copy(ROOT / "presets/smoke.yaml", project / "params.yaml")
    return project


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A new project after its first `dvc repro`, committed."""
    project = new_project(tmp_path_factory.mktemp("dvc") / "project")
    command(project, "git", "init", "--quiet")
    command(project, "git", "config", "user.name", "test")
    command(project, "git", "config", "user.email", "test@example.org")
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", "smoke")
    assert stages_run(project, "repro") == ALL
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", "first run")
    return project


@pytest.fixture
def project(committed) -> Path:
    """The clone as it was committed."""
    command(committed, "git", "checkout", "--quiet", ".")
    command(committed, "dvc", "checkout", "--force", "--quiet")
    return committed


def test_a_second_repro_does_nothing(project):
    assert stages_run(project, "repro") == set()


def test_another_temperature_reruns_the_student_alone_and_going_back_restores_it(project):
    assert stages_run(project, "exp", "run", "-S", "train.temperature=2") == {"distill"} | AFTER_DISTILL
    assert "student-distilled" in command(project, "dvc", "metrics", "diff")
    # Only the stage whose outputs git keeps, and which takes a second, is run again.
    assert stages_run(project, "exp", "run", "-S", "train.temperature=3.0") <= {"report"}
    assert command(project, "git", "diff", "--stat", "metrics/quality.json") == ""


def test_another_quantisation_leaves_distill_alone(project):
    changed = stages_run(project, "exp", "run", "-S", "quantize.methods=[int8]")
    assert changed == QUANTISATIONS | {"evaluate@student-int8", "evaluate@student-nf4", "report"}


def test_another_evaluation_leaves_the_models_alone(project):
    assert stages_run(project, "exp", "run", "-S", "evaluate.max_new_tokens=9") == EVALUATIONS | {"report"}


def test_runtime_settings_rerun_nothing(project):
    assert stages_run(project, "exp", "run", "-S", "runtime.device=cpu") == set()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("firstsight/reporting/table.py", {"report"}),
        ("firstsight/quantization/quantize.py", QUANTISATIONS),
        ("firstsight/models/vocabulary.py", {"cache-teacher-targets", "distill"}),
    ],
)
def test_an_edited_library_file_reruns_the_stages_that_import_it(project, file, expected):
    """Their outputs come out the same, bit for bit, so that nothing after them runs."""
    path = project / file
    path.write_text(path.read_text() + "\n# edited\n")
    assert stages_run(project, "repro") == expected


def test_a_queued_grid_of_temperatures_shows_in_the_experiments(project):
    command(project, "dvc", "exp", "run", "--queue", "-S", "train.temperature=1.5,4")
    command(project, "dvc", "queue", "start", "--jobs", "1")
    names = re.findall(r"^[0-9a-f]{7}\s+(\S+)", command(project, "dvc", "queue", "status"), re.MULTILINE)
    assert len(names) == 2
    for name in names:
        command(project, "dvc", "queue", "logs", "--follow", name)  # returns when the experiment ends
    shown = subprocess.run(["dvc", "exp", "show", "--csv"], cwd=project, capture_output=True, text=True, check=True)
    rows = {row["Experiment"]: row for row in csv.DictReader(io.StringIO(shown.stdout))}
    assert {rows[name]["train.temperature"] for name in names} == {"1.5", "4"}
    assert {rows[name]["State"] for name in names} == {"Success"}


def test_a_clone_shows_metrics_and_plots_before_anything_is_run(project, tmp_path):
    clone = tmp_path / "clone"
    command(project, "git", "clone", "--quiet", str(project), str(clone))
    assert "exact_match" in command(clone, "dvc", "metrics", "show")
    command(clone, "dvc", "plots", "show")
    page = (clone / "dvc_plots/index.html").read_text()
    assert "student-distilled" in page


def name_source(project: Path, role: str, source: str) -> None:
    values = YAML_SAFE.load(project / "params.yaml")
    values["models"][role] |= {"source": source, "init": None}
    write_params(project, values)


def test_a_model_of_the_users_where_a_stage_writes_is_refused_and_kept(tmp_path):
    project = new_project(tmp_path / "project")
    name_source(project, "teacher", "models/teacher")
    command(project, "git", "init", "--quiet")
    mine = project / "models/teacher/model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"months of work")
    done = subprocess.run(
        ["dvc", "repro", "download-models@teacher"], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "models.teacher: expected a source outside the pipeline's own outputs, found models/teacher" in done.stderr
    assert mine.read_bytes() == b"months of work"


def test_a_local_model_is_left_as_it_is_and_kept_once(settings, tmp_path, monkeypatch):
    """The user's files stay theirs, writable; models/ and DVC's cache share one copy of them."""
    monkeypatch.chdir(ROOT)
    mine = tmp_path / "mine"
    mine.mkdir()
    initialise(settings.models.student.init, mine)
    before = {path.name: (path.stat().st_mode, path.read_bytes()) for path in mine.iterdir()}
    project = new_project(tmp_path / "project")
    name_source(project, "student", str(mine))
    command(project, "git", "init", "--quiet")
    assert stages_run(project, "repro", "download-models@student") == {"download-models@student"}
    weights = project / "models/student/model.safetensors"
    cached = project / ".dvc/cache"
    assert any(weights.samefile(path) for path in cached.rglob("*") if path.is_file())
    (mine / "model.safetensors").write_bytes(b"trained on")
    assert weights.read_bytes() == before["model.safetensors"][1]
    (mine / "model.safetensors").write_bytes(before["model.safetensors"][1])
    assert before == {path.name: (path.stat().st_mode, path.read_bytes()) for path in mine.iterdir()}

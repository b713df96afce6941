"""What real DVC reruns after a change, and what it leaves alone. Drives `dvc` on a copy of the repository."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import (
    AFTER_DISTILL,
    EVALUATIONS,
    QUANTIZATIONS,
    ROOT,
    YAML_SAFE,
    command,
    new_project,
    stages_run,
    warm,
    write_params,
)

from firstsight.acquisition.initialise import initialise
from firstsight.core.variants import METHODS

pytestmark = [pytest.mark.system, pytest.mark.slow]


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
    assert "training.loss" in command(project, "dvc", "metrics", "diff")
    # Only the stage whose outputs git keeps, and which takes a second, is run again.
    assert stages_run(project, "exp", "run", "-S", "train.temperature=3.0") <= {"report"}
    assert command(project, "git", "diff", "--stat", "metrics/quality.json") == ""


def test_another_quantization_leaves_distill_alone(project):
    changed = stages_run(project, "exp", "run", "-S", "quantize.methods=[int8]")
    assert changed == QUANTIZATIONS | {f"evaluate@student-{method}" for method in METHODS} | {"report"}


def test_another_control_leaves_the_distilled_student_alone(project):
    """Its quantized copies too, which are those of the control where there is no teacher."""
    changed = stages_run(project, "exp", "run", "-S", "control.enabled=false")
    assert changed == {"finetune-student", "evaluate@student-finetuned", "report"}


def test_another_evaluation_leaves_the_models_alone(project):
    values = YAML_SAFE.load(project / "params.yaml")
    values["evaluate"]["max_new_tokens"] = 9
    write_params(project, values)
    # Not the report, because nothing is run that could change what it reads.
    assert stages_run(project, "repro", "--dry") == EVALUATIONS


@pytest.mark.parametrize("name", ["數據, a=b.jsonl", 'it\'s "so" (1) #2.jsonl'])
def test_a_file_of_any_name_is_read_if_it_is_quoted_for_dvc(project, name):
    (project / "my data").mkdir()
    file = project / "my data" / name
    file.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}"}) + "\n" for n in range(40)))
    quoted = f"my data/{name}".replace('"', '\\"')
    given = ("-S", "data.source=jsonl", "-S", f'data.path="{quoted}"')
    assert stages_run(project, "exp", "run", *given, "build-egoqa-dataset") == {"build-egoqa-dataset"}
    assert json.loads((project / "data/egoqa/card.json").read_text())["source"] == "jsonl"
    assert stages_run(project, "repro", "build-egoqa-dataset") == set()
    shutil.rmtree(project / "my data")


def test_runtime_settings_rerun_nothing(project):
    assert stages_run(project, "exp", "run", "-S", "runtime.device=cpu") == set()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("firstsight/reporting/comparison.py", {"report"}),
        ("firstsight/quantization/quantize.py", QUANTIZATIONS),
        ("firstsight/distillation/vocabulary.py", {"cache-teacher-targets", "distill", "finetune-student"}),
        (
            "firstsight/caching/shards.py",
            {"cache-teacher-targets", "cache-visual-tokens", "distill", "finetune-student"},
        ),
    ],
)
def test_an_edited_library_file_reruns_the_stages_that_import_it(project, file, expected):
    path = project / file
    path.write_text(path.read_text() + "\n# edited\n")
    assert stages_run(project, "repro", "--dry") == expected


def test_what_comes_out_the_same_reruns_nothing_after_it(project):
    path = project / "firstsight/distillation/vocabulary.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert stages_run(project, "repro") == {"cache-teacher-targets", "distill", "finetune-student"}


def test_a_queued_grid_of_temperatures_shows_in_the_experiments(project):
    # No further than the first stage that the temperature changes.
    command(project, "dvc", "exp", "run", "--queue", "-S", "train.temperature=1.5,4", "distill")
    command(project, "dvc", "queue", "start", "--jobs", "1", **warm())
    names = re.findall(r"^[0-9a-f]{7}\s+(\S+)", command(project, "dvc", "queue", "status"), re.MULTILINE)
    assert len(names) == 2
    for name in names:
        printed = command(project, "dvc", "queue", "logs", "--follow", name)  # returns when the experiment ends
        assert "wrote models/student-distilled" in printed
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


def test_what_one_clone_has_run_another_pulls(project, tmp_path):
    """What a commit names, and what none does: the run cache finds that by parameters, data and code."""
    clone, remote = tmp_path / "clone", str(tmp_path / "remote")
    command(project, "dvc", "remote", "add", "--default", "shared", remote)
    command(project, "dvc", "push", "--run-cache")
    command(project, "git", "clone", "--quiet", str(project), str(clone))
    command(clone, "dvc", "remote", "add", "--default", "shared", remote)
    assert stages_run(clone, "repro", "--pull") == set()
    assert (clone / "models/student-distilled/model.safetensors").exists()
    command(project, "dvc", "exp", "run", "-S", "quantize.methods=[int8]", "quantize-student@int8", **warm())
    command(project, "dvc", "push", "--run-cache")
    shutil.copy(project / "params.yaml", clone / "params.yaml")
    assert stages_run(clone, "repro", "--pull", "quantize-student@int8") == set()
    config = json.loads((clone / "models/student-int8/config.json").read_text())
    assert config["quantization_config"]["load_in_8bit"]


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


def test_an_embedded_model_that_changes_is_copied_again(tmp_path):
    project = new_project(tmp_path / "project")
    name_source(project, "student", "embedded/student")
    command(project, "git", "init", "--quiet")
    stage = "download-models@student"
    assert stages_run(project, "repro", stage) == {stage}
    (project / "embedded/student/notes.txt").write_text("trained for longer")
    assert stages_run(project, "repro", stage) == {stage}
    assert (project / "models/student/notes.txt").exists()

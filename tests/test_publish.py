"""Publishing a measured student, with the hub's real client to a hub on loopback; and what is not published."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import change
from families import save_qwen2
from hub_server import Hub, Repository, point_client_at
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.utils import _http
from test_dvc import command, new_project
from test_engine import without_torch

from firstsight.asking.asked_model import AskedModel
from firstsight.cli import app, quiet
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files, read_json, write_json
from firstsight.core.variants import DISTILLED
from firstsight.export.folder import export_folders
from firstsight.generation.answering import answers
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.publishing import checks, model_card
from firstsight.records.parquet import Split
from firstsight.records.sample import Record

NAME = "me/tiny"
TOKEN = "hf_secretsecretsecret"
STUDENT = "models/student-distilled"
# Those that the smoke preset asks for.
QUANTIZED, EXPORTED = "student-nf4", "student-onnx-w4a8"

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def measured(smoke, tmp_path_factory) -> Path:
    """A committed clone with the outputs of a run, all stages up to date. Read only."""
    project = new_project(tmp_path_factory.mktemp("publish") / "project")
    for output in ("data", "models", "evaluations", "metrics"):
        shutil.copytree(smoke / output, project / output, dirs_exist_ok=True)
    command(project, "git", "init", "--quiet")
    command(project, "git", "config", "user.name", "test")
    command(project, "git", "config", "user.email", "test@example.org")
    command(project, "dvc", "commit", "--force", "--quiet")
    command(project, "git", "add", "--all")
    command(project, "git", "commit", "--quiet", "--message", "measured")
    return project


@pytest.fixture
def project(measured, tmp_path, monkeypatch) -> Path:
    """A copy to work in and to change, with a token; warnings and progress bars stay as they are in this process."""
    folder = Path(shutil.copytree(measured, tmp_path / "project", symlinks=True))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(quiet, "quiet_transformers", lambda: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return folder


@pytest.fixture
def served(tmp_path, monkeypatch):
    with Hub(created=tmp_path / "hub") as server:
        point_client_at(server, tmp_path, monkeypatch)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))  # between the client's retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def run(*arguments: str) -> None:
    app.run(["publish", *arguments])


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert not list(Path("models").glob(".publish*"))
    return str(error.value)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: fingerprint_files([path]) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("variant", [DISTILLED, QUANTIZED])
def test_what_was_pushed_comes_back_and_answers_as_its_card_says(served, project, tmp_path, variant):
    before = contents(project / "models" / variant)
    run(variant, NAME, "--push")
    assert contents(project / "models" / variant) == before
    assert served.repositories[NAME].private
    large = [request for request in served.requests if request.path.startswith("/cdn/lfs")]
    assert [(request.method, request.authorization) for request in large] == [("PUT", None)]

    back = Path(snapshot_download(NAME))
    found = contents(back)
    readme = (back / "README.md").read_text()
    assert found.pop("README.md")
    assert found == before
    assert readme == model_card.model_card(variant, NAME)

    # What its readers paste into a fresh Python.
    sample = next(one for one in Split(project / "data/egoqa/test.parquet") if one.media_kind == "image")
    (tmp_path / "scene.jpg").write_bytes(sample.frames[0])
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "block.py").write_text(block)
    hub_at = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "block.py"], cwd=tmp_path, env=os.environ | hub_at, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = project / "models" / variant
    record = Record("asked", "What is in your left hand?", "", (), "open")
    limit = params.load().evaluate.max_new_tokens
    asked = answers(load_model(folder, "auto", "cpu"), load_processor(folder), [(sample, record)], 1, limit)
    assert [done.stdout.strip()] == list(asked)


def test_an_export_comes_back_and_answers_without_torch_as_its_card_says(served, project, tmp_path):
    before = contents(project / "models" / EXPORTED)
    run(EXPORTED, NAME, "--push")
    assert served.repositories[NAME].files.keys() == {*before, "README.md"}
    readme = served.repositories[NAME].files["README.md"].decode()
    assert readme == model_card.model_card(EXPORTED, NAME)
    assert ", with w4a8 weights, which run without PyTorch." in readme
    assert ModelCard(readme).data.library_name == "onnx"

    # What its readers paste into a shell, in a copy of the repository.
    sample = next(one for one in Split(project / "data/egoqa/test.parquet") if one.media_kind == "image")
    (project / "scene.jpg").write_bytes(sample.frames[0])
    (block,) = re.findall(r"```\n(pip .*?)```", readme, re.DOTALL)
    install, *commands = block.splitlines()
    assert install == "pip install -r requirements-device.txt"
    hub_at = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment = without_torch(tmp_path) | hub_at
    done = subprocess.run(
        ["sh", "-ec", "\n".join(commands)], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(project / EXPORTED) == before | {"README.md": fingerprint_files([project / EXPORTED / "README.md"])}
    settings = params.load().evaluate
    asked = replace(sample, records=(Record("asked", "What is in your left hand?", "", (), "open"),))
    answer = AskedModel(project / "models" / EXPORTED, settings, "cpu").answer(asked).line()
    assert done.stdout.splitlines()[-1].endswith(f" s  {answer}")


def test_without_push_it_shows_files_and_card_and_asks_no_hub(served, project, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    run("student-distilled", NAME)
    listed, shown = capsys.readouterr().out.split("\nREADME.md:\n\n")
    weights = (project / STUDENT / "model.safetensors").stat().st_size
    assert f"{weights / 1000:.3g} kB  model.safetensors" in listed
    assert {line.split()[-1] for line in listed.splitlines()} == {*contents(project / STUDENT), "README.md"}
    assert shown == model_card.model_card("student-distilled", NAME) + "\n"
    assert served.requests == []
    assert not list(Path("models").glob(".publish*"))


def test_the_card_says_what_was_measured_and_is_valid_metadata(project):
    models = read_json(Path("metrics/models.json"), "report")
    models["student"] |= {"source": "Qwen/Qwen2-VL-2B-Instruct", "commit": "abc", "licence": "qwen-research"}
    models["teacher"] |= {"source": str(project / "secret/egogpt"), "licence": "apache-2.0"}
    write_json(Path("metrics/models.json"), models)
    quality = read_json(Path("metrics/quality.json"), "report")
    quality["student-distilled"] |= {"exact_match": 0.1234, "exact_match_low": 0.1, "exact_match_high": 0.2, "new": {}}
    quality["teacher"] |= {"exact_match": 0.0, "exact_match_low": 0.0, "exact_match_high": 0.05}
    write_json(Path("metrics/quality.json"), quality)
    text = model_card.model_card("student-distilled", NAME)
    assert "| exact match | 0.123 (0.10 to 0.20) | 0.000 (0.00 to 0.05) |" in text
    assert "| student, before distillation | Qwen/Qwen2-VL-2B-Instruct | abc | qwen-research |" in text
    assert "| teacher | egogpt |  | apache-2.0 |" in text
    assert "secret" not in text
    counts = read_json(Path("data/egoqa/card.json"), "build-egoqa-dataset")["splits"]["test"]
    assert f"| test | {counts['records']} | {counts['samples']} |" in text
    assert "  temperature: 3.0\n" in text
    assert "{{" not in text
    read = ModelCard(text).data
    assert (read.license, read.license_name) == ("other", "qwen-research")
    assert (read.base_model, read.library_name) == ("Qwen/Qwen2-VL-2B-Instruct", "transformers")
    models["student"] |= {"licence": "apache-2.0", "commit": None}
    write_json(Path("metrics/models.json"), models)
    read = ModelCard(model_card.model_card("student-distilled", NAME)).data
    assert (read.license, read.license_name, read.base_model) == ("apache-2.0", None, None)


def test_the_card_can_be_printed_alone(project, capsys):
    app.run(["card", QUANTIZED])
    assert capsys.readouterr().out == model_card.model_card(QUANTIZED, f"models/{QUANTIZED}")


def test_a_second_push_replaces_the_first_and_leaves_what_is_not_a_model(served, project, monkeypatch, tmp_path):
    shutil.copytree(project / "models/teacher", tmp_path / "hub" / NAME)
    (folder := tmp_path / "hub" / NAME).joinpath("notes.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    for name in ("model.safetensors.index.json", "exported.json", "decoder.onnx", "decoder.onnx.data"):
        (folder / name).write_text("{}")
    served.repositories[NAME] = Repository(folder)
    (project / "models/student/LICENSE").write_text("the student's")
    monkeypatch.setattr(checks, "check_measured", lambda: None)  # of the licence that was not downloaded
    run("student-distilled", NAME, "--push")
    names = {*contents(project / STUDENT), "README.md", "notes.md", "LICENSE"}
    assert names <= set(served.repositories[NAME].files)
    weights = [name for name in served.repositories[NAME].files if "safetensors" in name or "onnx" in name]
    assert weights == ["model.safetensors"]
    assert "exported.json" not in served.repositories[NAME].files
    assert (folder / "LICENSE").read_text() == "the student's"


def nobody(project):
    return ["student-distilled", "tiny"], "tiny: expected a hub repository as OWNER/NAME"


def bad_name(project):
    return ["student-distilled", "me/a--b/c"], "me/a--b/c: expected a hub repository as OWNER/NAME"


def uncommitted(project):
    (project / "LICENSE").write_text("changed")
    return ["student-distilled", NAME], "git: expected everything committed, found changes in LICENSE (1 in all)"


def no_clone(project):
    shutil.rmtree(project / ".git")
    return ["student-distilled", NAME], "git: expected a clone of the repository, found fatal: not a git repository"


def stale(project):
    change(project, "train", alpha=0.123)
    command(project, "git", "commit", "--quiet", "--all", "--message", "another alpha")
    return ["student-distilled", NAME], "dvc: expected every stage up to date, found distill"


def other_weights(project):
    path = project / STUDENT / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    return ["student-distilled", NAME], "dvc: expected every stage up to date, found distill"


def unmeasured(project):
    for name in ("quality", "performance"):
        path = project / f"metrics/{name}.json"
        figures = json.loads(path.read_text())
        del figures[QUANTIZED]
        write_json(path, figures)
    return [QUANTIZED, NAME], f"metrics: expected figures of {QUANTIZED}, found those of teacher, "


def pickle(project):
    (project / STUDENT / "pytorch_model.bin").write_bytes(b"a pickle")
    return ["student-distilled", NAME], f"{STUDENT}: expected weights as safetensors, and text files, found pytorch_mod"


def cut_short(project):
    path = project / STUDENT / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])
    return ["student-distilled", NAME], f"{STUDENT}/model.safetensors: expected safetensors, found a broken file"


def damaged_export(project):
    path = project / "models" / EXPORTED / "decoder.onnx"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])
    return [EXPORTED, NAME], f"models/{EXPORTED}/decoder.onnx: expected a graph that onnxruntime runs, found "


def stray_in_export(project):
    (project / "models" / EXPORTED / "model.safetensors").write_bytes(b"of another")
    return [EXPORTED, NAME], f"models/{EXPORTED}: expected weights as ONNX graphs, and text files, found model.safetens"


def missing(project):
    shutil.rmtree(project / STUDENT)
    return ["student-distilled", NAME], f"{STUDENT}: expected a model folder, found no such folder"


def left_out(project):
    shutil.rmtree(project / STUDENT)
    (project / STUDENT).mkdir()
    write_json(project / STUDENT / "left-out.json", "not asked for")
    return ["student-distilled", NAME], f"{STUDENT}: expected a model, found it left out (not asked for)"


@pytest.mark.parametrize(
    "damage",
    [
        *(nobody, bad_name, uncommitted, no_clone, stale, other_weights, unmeasured, pickle, cut_short),
        *(damaged_export, stray_in_export, missing, left_out),
    ],
)
def test_what_is_not_the_measured_model_is_refused(served, project, damage):
    arguments, expected = damage(project)
    assert expected in refusal(*arguments)
    assert served.requests == []


def test_a_language_model_and_its_export_may_be_published(settings, processor, tmp_path):
    save_qwen2(tmp_path, settings, processor)
    checks.check_folder(tmp_path)
    (exported := tmp_path / "exported").mkdir()
    export_folders(tmp_path, {"float32": exported}, [])
    checks.check_folder(exported)


def test_without_a_token_nothing_is_pushed(served, project, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN: expected a token that may write" in refusal("student-distilled", NAME, "--push")
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\x0b.")
    assert "HF_TOKEN: expected printable" in refusal("student-distilled", NAME, "--push")
    assert served.requests == []


@pytest.mark.parametrize(
    ("path", "status", "remedy"),
    [
        ("/api/repos/create", 401, "correct HF_TOKEN"),
        ("/api/repos/create", 403, "use a token with write access to it"),
        ("/api/repos/create", 500, "check the network"),
        ("/api/repos/create", 0, "check the network"),
        ("/api/validate-yaml", 500, "check the network"),
        ("/preupload/main", 403, "use a token with write access to it"),
        ("/objects/batch", 401, "correct HF_TOKEN"),
        ("/objects/batch", 0, "check the network"),
        ("{oid}", 500, "check the network"),
        ("{oid}", 0, "check the network"),
        ("/commit/main", 409, "another commit was pushed meanwhile"),
        ("/commit/main", 500, "check the network"),
        ("/commit/main", 0, "check the network"),
    ],
)
def test_a_hub_that_fails_is_one_line_and_a_rerun_is_enough(served, project, monkeypatch, path, status, remedy):
    monkeypatch.setattr(checks, "check_committed", lambda: None)
    monkeypatch.setattr(checks, "check_measured", lambda: None)
    oid = hashlib.sha256((project / STUDENT / "model.safetensors").read_bytes()).hexdigest()
    served.statuses[path.format(oid=oid)] = status
    found = refusal("student-distilled", NAME, "--push")
    assert found.startswith(f"{NAME}: expected the hub to accept the commit, found ")
    assert remedy in found
    assert not served.repositories or not served.repositories[NAME].files
    served.statuses.clear()
    run("student-distilled", NAME, "--push")
    assert {"README.md", "model.safetensors"} <= set(served.repositories[NAME].files)


def test_a_licence_that_the_hub_refuses_is_said(served, project, monkeypatch):
    monkeypatch.setattr(model_card, "model_card", lambda *_: "---\nlicense: other\n---\n")
    found = refusal("student-distilled", NAME, "--push")
    assert 'Invalid metadata in README.md. - "license_name" is required' in found


def make(project: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """`make publish` in an environment that is set up."""
    return subprocess.run(
        ["make", "publish", "--silent", "--old-file=setup", f"VENV={sys.prefix}", *words],
        cwd=project,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_make_publish_pushes_only_when_it_is_told_to(project):
    nowhere = make(project)
    assert nowhere.returncode != 0
    assert "error: expected REPO=owner/name, found none" in nowhere.stdout + nowhere.stderr
    for words, expected in (
        ((), "student-distilled me/tiny"),
        (("PUSH=0",), "student-distilled me/tiny"),
        (("PUSH=1", f"VARIANT={QUANTIZED}"), f"{QUANTIZED} me/tiny --push"),
    ):
        told = make(project, "--just-print", f"REPO={NAME}", *words).stdout.splitlines()[-1]
        assert told.strip() == f"python -m firstsight publish {expected}"


def test_the_token_appears_nowhere(served, project, tmp_path):
    """In processes of their own, as a user runs them: refused first, then pushed."""
    hub_at = {
        "HF_ENDPOINT": served.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    served.refused = TOKEN
    refused = make(project, f"REPO={NAME}", "PUSH=1", **hub_at)
    served.refused = None
    assert f"error: {NAME}: expected the hub to accept the commit, found " in refused.stderr
    assert "Traceback" not in refused.stderr
    done = make(project, f"REPO={NAME}", "PUSH=1", HF_DEBUG="1", **hub_at)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"pushed: {served.endpoint}/{NAME}/commit/")
    assert f"Bearer {TOKEN}" in {request.authorization for request in served.requests}
    for process in (refused, done):
        assert TOKEN not in process.stdout + process.stderr
    tests = project / "tests"  # which spell it
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tests)):
        assert TOKEN.encode() not in path.read_bytes(), path

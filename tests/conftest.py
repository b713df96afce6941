"""Tiny models of the real architecture, and two runs of the smoke preset, stage by stage and by DVC, for all tests."""

import atexit
import gc
import importlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asks the internet: what loads models finds them on disk, and `hub_server` turns this off to ask a local hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Give each parallel worker, and every process that its tests start, as many cores of its own. Threads are counted
    # from them, when torch is imported and by `pick_device`, so that the same bits come out in every worker.
    bound, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    share = max(1, len(bound) // workers)
    first = int(worker.removeprefix("gw")) * share % len(bound)
    os.sched_setaffinity(0, bound[first : first + share])

import hypothesis
import pytest
from filelock import FileLock
from PIL import Image
from ruamel.yaml import YAML
from warm import ADDRESS, PYTHON

from firstsight.core import params
from firstsight.core.processes import launcher
from firstsight.core.variants import METHODS, VARIANTS
from firstsight.records.sample import Record, Sample

# As stages do: there are a million objects of torch and transformers to look through.
gc.set_threshold(50_000)
# The same cases every time, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).parent.parent
YAML_SAFE = YAML(typ="safe", pure=True)
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
# Every stage, in an order that satisfies dvc.yaml, with its arguments.
STAGES = (
    ("download_models", "teacher"),
    ("download_models", "student"),
    ("build_egoqa_dataset",),
    ("check_inputs",),
    ("finetune_teacher",),
    ("cache_teacher_targets",),
    ("cache_visual_tokens",),
    ("distill",),
    ("finetune_student",),
    ("quantize_student", "int8"),
    ("quantize_student", "nf4"),
    ("quantize_student", "int4"),
    ("export_student",),
    ("export_teacher",),
    ("evaluate", "teacher"),
    ("evaluate", "teacher-int8"),
    ("evaluate", "teacher-nf4"),
    ("evaluate", "teacher-int4"),
    ("evaluate", "teacher-onnx"),
    ("evaluate", "student"),
    ("evaluate", "student-finetuned"),
    ("evaluate", "student-distilled"),
    ("evaluate", "student-int8"),
    ("evaluate", "student-nf4"),
    ("evaluate", "student-int4"),
    ("evaluate", "student-onnx"),
    ("evaluate", "student-onnx-int8"),
    ("evaluate", "student-onnx-w4a8"),
    ("report",),
)
# The same as DVC names them.
EVALUATIONS = {f"evaluate@{variant}" for variant in VARIANTS}
QUANTIZATIONS = {f"quantize-student@{method}" for method in METHODS}
AFTER_DISTILL = QUANTIZATIONS | {
    "export-student",
    "evaluate@student-distilled",
    "evaluate@student-nf4",
    "evaluate@student-onnx-w4a8",
    "report",
}
ALL = EVALUATIONS | AFTER_DISTILL | {
    "download-models@teacher",
    "download-models@student",
    "build-egoqa-dataset",
    "check-inputs",
    "finetune-teacher",
    "cache-teacher-targets",
    "cache-visual-tokens",
    "distill",
    "finetune-student",
    "export-teacher",
}  # fmt: skip


def run_stage(folder: Path, module: str, *arguments: str) -> None:
    """Run a stage in this process, in `folder`; what it raises is raised here."""
    with chdir(folder):
        importlib.import_module(f"stages.{module}").run(*arguments)


@cache
def warm() -> Mapping[str, str]:
    """Variables with which Python, found by PATH or by torchrun, runs programs in processes of `warm.py`, begun here.

    Without them where it may not fork. For tests of what programs do, not of how they start or are killed by others.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return {}
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder)
    socket, python = folder / "server", folder / "python"
    server = ROOT / "tests/warm.py"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -SEs "{server}" "$@"\n')
    python.chmod(0o700)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # It ends when this process does, which closes its stdin.
    process = subprocess.Popen([sys.executable, server, "serve", socket], env=environment, stdin=subprocess.PIPE)
    while not socket.exists():
        assert process.poll() is None
        time.sleep(0.1)
    # All tests of a worker get these, and none may change them for the others.
    return MappingProxyType({ADDRESS: str(socket), PYTHON: str(python), "PATH": f"{folder}:{os.environ['PATH']}"})


def run_module(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m` in a process of its own, in `folder`."""
    words, environment = [sys.executable, "-m", module, *arguments], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def launch(folder: Path, processes: int, *program: str) -> subprocess.CompletedProcess:
    """Run a program, or `-m` and a module, in so many processes on the CPU.

    By torch's own launcher: accelerate's, told to use the CPU, starts one process, however many it is asked for.
    """
    python = warm().get(PYTHON, sys.executable)
    words = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *program]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment = os.environ | warm() | environment
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def launch_as_on_gpus(folder: Path, processes: int, *program: str) -> subprocess.CompletedProcess:
    """Run a program, or `-m` and a module, as a stage starts itself on a machine of so many GPUs."""
    environment = os.environ | warm() | {"PYTHONPATH": str(ROOT)}
    words = [*launcher(processes), *program]
    words[0] = warm().get(PYTHON, sys.executable)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)


@contextmanager
def one_core() -> Iterator[None]:
    """Have this process, and what it starts, use a single core and thread: with more, sums are rounded otherwise."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(bound)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def workspace(folder: Path, preset: str = "smoke") -> Path:
    """A folder in which stages run: the preset as params.yaml, and what else they read of the repository."""
    shutil.copytree(ROOT / "presets", folder / "presets")
    shutil.copy(ROOT / "presets" / f"{preset}.yaml", folder / "params.yaml")
    return folder


def change(folder: Path, section: str, **values) -> None:
    document = YAML_SAFE.load(folder / "params.yaml")
    document[section] |= values
    write_params(folder, document)


def exchange_tokens(model: Path) -> None:
    """Let tokens 300 and 301 of a model's tokenizer stand for each other's words."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second = (word for word, index in words.items() if index in (300, 301))
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))


def write_params(folder: Path, values) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Mark tests of DVC, Slurm and a browser `system`, and put the longest files first: workers take files in order."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    for item in items:
        if {"committed", "slurm", "browser"} & set(item.fixturenames):
            item.add_marker("system")
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported by now is no garbage


def made_once(tmp_path_factory, worker_id: str, name: str, make) -> Path:
    """Return a folder that `make` has filled, in the first of the parallel workers that needed it, for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    whole = folder.with_name(f"{name}.whole")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not whole.exists():
            folder.mkdir()  # fails where making it has failed in another worker
            make(folder)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, worker_id) -> Path:
    """A workspace after one run of the smoke preset. Read only: tests that write take a copy."""

    def run(folder: Path) -> None:
        workspace(folder)
        for stage in STAGES:
            run_stage(folder, *stage)

    return made_once(tmp_path_factory, worker_id, "smoke", run)


@pytest.fixture(autouse=True)
def smoke_stays_as_it_is(request):
    """A test that changes what all share fails by itself, instead of another after it."""
    folder = request.getfixturevalue("smoke") if "smoke" in request.fixturenames else None
    before = _files(folder)
    yield
    assert [path for path, _ in _files(folder) ^ before] == []


def _files(folder: Path | None) -> set[tuple[Path, tuple[int, int]]]:
    """Each file, when it was written, and its size."""
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()] if folder else []
    return {(path, (state.st_mtime_ns, state.st_size)) for path, state in files}


@pytest.fixture
def smoke_copy(smoke, tmp_path) -> Path:
    return Path(shutil.copytree(smoke, tmp_path / "smoke"))


def command(project: Path, *words: str, **variables: str) -> str:
    """Run a command in the project, with variables of the environment, and return what it printed."""
    env = os.environ | variables
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stages_run(project: Path, *words: str, **variables: str) -> set[str]:
    """The stages that a dvc command ran, each in a process of its own, and of `warm.py` unless variables are given."""
    printed = command(project, "dvc", *words, **(variables or warm()))
    return set(re.findall(r"Running stage '([^']+)'", printed))


def new_project(project: Path) -> Path:
    """A clone whose params.yaml is the smoke preset, before anything has been run."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", ".scratch", "cache", "tmp", "config.local", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, project, ignore=ignored)
    for output in ("data/egoqa", "data/teacher-targets", "data/visual-tokens", "models", "evaluations", "metrics"):
        shutil.rmtree(project / output, ignore_errors=True)
    for file in ("dvc.lock", "data/checked.json"):
        (project / file).unlink(missing_ok=True)
    shutil.copy(ROOT / "presets/smoke.yaml", project / "params.yaml")
    return project


@pytest.fixture(scope="session")
def committed(tmp_path_factory, worker_id) -> Path:
    """A new project after its first `dvc repro`, committed; a copy for this worker, links included.

    Tests leave its commit and cache as they are.
    """

    def run(folder: Path) -> None:
        project = new_project(folder / "project")
        command(project, "git", "init", "--quiet")
        command(project, "git", "config", "user.name", "test")
        command(project, "git", "config", "user.email", "test@example.org")
        command(project, "git", "add", "--all")
        command(project, "git", "commit", "--quiet", "--message", "smoke")
        assert stages_run(project, "repro") == ALL
        command(project, "git", "add", "--all")
        command(project, "git", "commit", "--quiet", "--message", "first run")

    made = made_once(tmp_path_factory, worker_id, "committed", run)
    copy = tmp_path_factory.mktemp("dvc")
    command(made, "cp", "-a", "project", str(copy))
    return copy / "project"


@pytest.fixture(scope="session")
def settings() -> params.Params:
    return params.load(ROOT / "presets" / "smoke.yaml")


@pytest.fixture(scope="session")
def processor(settings):
    # Here and below, so that tests which need no models start without loading torch.
    from firstsight.acquisition.initialise import build_processor, train_tokenizer

    init = settings.models.student.init
    corpus = (ROOT / init.corpus).read_text().splitlines()
    return build_processor(train_tokenizer(corpus, init.vocabulary_size), init.max_pixels)


@pytest.fixture(scope="session")
def model(settings, processor):
    import torch

    from firstsight.acquisition.initialise import build_model

    torch.manual_seed(0)
    return build_model(settings.models.teacher.init, processor.tokenizer).eval()


@pytest.fixture(scope="session")
def language_models(settings, processor, tmp_path_factory) -> dict[str, Path]:
    """A folder for each family of text_families.py, by its name: to be read, and not changed."""
    from text_families import TEXT_SAVE  # it imports this file

    made = {name: tmp_path_factory.mktemp(name) for name in TEXT_SAVE}
    for name, folder in made.items():
        TEXT_SAVE[name](folder, settings, processor)
    return made


def picture(seed: int, width: int = 84, height: int = 84) -> bytes:
    """A JPEG of coloured noise."""
    noise = random.Random(seed).randbytes(3 * (width // 4) * (height // 4))
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width // 4, height // 4), noise).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def make_sample(name: str, kind: str, frames: int, questions: list[tuple[str, str]]) -> Sample:
    records = tuple(
        Record(f"{name}-{number}", question, answer, (answer,), "open")
        for number, (question, answer) in enumerate(questions)
    )
    return Sample(
        id=name,
        group=name,
        source="test",
        media_kind=kind,
        frames=tuple(picture(number) for number in range(frames)),
        fps=2.0 if kind == "video" else 0.0,
        records=records,
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with its driver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def as_wide_as(browser, pixels: int, height: int = 900) -> None:
    """A window cannot be narrower than 500 pixels; what a phone shows can."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 500},
    )

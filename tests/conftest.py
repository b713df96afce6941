"""Tiny models of the real architecture, and one run of the smoke preset through every stage, shared by the tests."""

import importlib
import io
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML

from firstsight.core import params
from firstsight.data.records import Record, Sample
from firstsight.models.initialise import build_model, build_processor, train_tokenizer

# The same cases every time, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).parent.parent
YAML_SAFE = YAML(typ="safe", pure=True)
# Every stage, in an order that satisfies dvc.yaml, with its arguments.
STAGES = (
    ("download_models", "teacher"),
    ("download_models", "student"),
    ("build_egoqa_dataset",),
    ("finetune_teacher",),
    ("cache_teacher_targets",),
    ("distill",),
    ("quantize_student",),
    ("evaluate", "teacher"),
    ("evaluate", "student"),
    ("evaluate", "student-distilled"),
    ("evaluate", "student-quantized"),
    ("report",),
)


def run_stage(folder: Path, module: str, *arguments: str) -> None:
    """Run a stage in this process, in `folder`; what it raises is raised here."""
    before, argv = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = [module, *arguments]
    try:
        importlib.import_module(f"stages.{module}").run()
    finally:
        os.chdir(before)
        sys.argv = argv


def launch(folder: Path, processes: int, *program: str) -> subprocess.CompletedProcess:
    """Run a program, or `-m` and a module, in so many processes on the CPU."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *program]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def workspace(folder: Path, preset: str = "smoke") -> Path:
    """A folder in which stages run: the preset as params.yaml, and what else they read of the repository."""
    shutil.copytree(ROOT / "presets", folder / "presets")
    shutil.copy(ROOT / "presets" / f"{preset}.yaml", folder / "params.yaml")
    return folder


def change(folder: Path, section: str, **values) -> None:
    document = YAML_SAFE.load(folder / "params.yaml")
    document[section] |= values
    write_params(folder, document)


def write_params(folder: Path, values) -> None:
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(values, file)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    """A workspace after one run of the smoke preset. Read only: tests that write take a copy."""
    folder = workspace(tmp_path_factory.mktemp("smoke"))
    for stage in STAGES:
        run_stage(folder, *stage)
    return folder


@pytest.fixture
def smoke_copy(smoke, tmp_path) -> Path:
    return Path(shutil.copytree(smoke, tmp_path / "smoke"))


@pytest.fixture(scope="session")
def settings() -> params.Params:
    return params.load(ROOT / "presets" / "smoke.yaml")


@pytest.fixture(scope="session")
def processor(settings):
    init = settings.models.student.init
    corpus = (ROOT / init.corpus).read_text().splitlines()
    return build_processor(train_tokenizer(corpus, init.words), init.max_pixels)


@pytest.fixture(scope="session")
def model(settings, processor):
    torch.manual_seed(0)
    return build_model(settings.models.teacher.init, processor.tokenizer).eval()


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

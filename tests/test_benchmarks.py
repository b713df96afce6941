"""Benchmarks compare what computes the same, and start with nothing installed but what they measure."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import loss

# What a machine for benchmarks need not have: libraries of readers, reports, quantization and the pipeline.
ABSENT = (
    *("av", "qwen_vl_utils", "datasets", "bitsandbytes", "rouge_score", "sacrebleu"),
    *("dvc", "matplotlib", "pandas", "tabulate", "typer", "gradio", "liger_kernel", "trl"),
)
# As sitecustomize.py in a folder of PYTHONPATH, Python runs it in every process: these libraries are not found.
HIDE = f"""import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
# Each benchmark at a tiny scale, printing its rows instead of writing them. Cases of the first two share one process,
# in which only the first one's peak can be measured.
LOSS = """
from benchmarks import loss
loss.STUDENT, loss.TEACHER, loss.SHARED, loss.TOKENS = (311, 24), (337, 40), 307, {"cpu": (9,)}
loss.alone = lambda module, name, tokens, device: loss.measure(name, int(tokens), device) | {"bytes": 1}
loss.write = lambda name, rows: print(json.dumps({name: rows}))
loss.run()
"""
DISTILL_STEP = """
from benchmarks import distill_step
for sizes in (distill_step.QWEN2_VL_7B, distill_step.QWEN2_VL_2B):
    sizes |= {"num_hidden_layers": 1, "vocab_size": 8192}
distill_step.SHARED = 5120
distill_step.SCALE["cpu"], distill_step.STEPS["cpu"], distill_step.SAMPLES = (8, 56), 1, 1
distill_step.alone = lambda module, *arguments: distill_step.measure(*arguments) | {"bytes": 1}
distill_step.write = lambda name, rows: print(json.dumps({name: rows}))
distill_step.run()
"""
TRUE_SIZE = """
from pathlib import Path
from benchmarks import true_size
true_size.QWEN2_VL_7B["num_hidden_layers"] = true_size.QWEN2_VL_2B["num_hidden_layers"] = 1
true_size.VIDEO["cpu"], true_size.STEPS = (2, 56), 1
true_size.write = lambda name, rows: print(json.dumps({name: rows}))
sys.argv[1:] = ["presets/smoke.yaml"]
true_size.run()
"""


def test_the_losses_side_by_side_agree(monkeypatch):
    monkeypatch.setattr(loss, "STUDENT", (311, 24))
    monkeypatch.setattr(loss, "TEACHER", (337, 40))
    monkeypatch.setattr(loss, "SHARED", 307)
    plain, ours = (loss.measure(name, 9, "cpu")["loss"] for name in ("plain PyTorch", "FirstSight"))
    assert ours == pytest.approx(plain, rel=1e-5)
    assert set(loss.implementations("cpu")) == {"plain PyTorch", "Liger, chunked", "FirstSight"}


@pytest.mark.system
@pytest.mark.parametrize(
    ("script", "column", "measured"),
    [
        (LOSS, "implementation", {"plain PyTorch", "FirstSight"}),
        (DISTILL_STEP, "teacher", {"cached", "online, float32"}),
        (TRUE_SIZE, "stage", {"cache-teacher-targets", "distill"}),
    ],
    ids=["loss", "distill_step", "true_size"],
)
def test_a_benchmark_imports_only_what_it_measures(script, column, measured, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-c", f"import json, sys\n{script}"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | variables | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, rows),) = json.loads(done.stdout.splitlines()[-1]).items()
    assert {row[column] for row in rows} == measured
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.system
def test_settings_are_compared_on_the_same_models(smoke, tmp_path):
    script = (
        "from benchmarks import settings\n"
        "kept = ('as it is, 1 thread', 'bitsandbytes told of AVX-512-BF16')\n"
        "settings.SETTINGS = {name: settings.SETTINGS[name] for name in kept}\n"
        "settings.write = lambda name, rows: print(json.dumps({name: rows}))\n"
        "settings.run()\n"
    )
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for name in ("models", "data", "params.yaml", "evaluations", "firstsight", "stages", "benchmarks"):
        source = smoke / name if (smoke / name).exists() else ROOT / name
        (tmp_path / name).symlink_to(source)
    words = [sys.executable, "-c", f"import json, sys\nsys.argv[1:] = ['student-nf4']\n{script}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["settings"]
    assert [row["setting"] for row in rows] == ["as it is, 1 thread", "bitsandbytes told of AVX-512-BF16"]
    assert {row["answers_that_differ"] for row in rows} == {0}
    quality = json.loads((smoke / "evaluations/student-nf4/quality.json").read_text())
    assert rows[0]["questions"] == quality["questions"]

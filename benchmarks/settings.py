"""Measure how far the quality of the same models differs between machine settings that change rounding.

    python -m benchmarks.settings [VARIANT...]      default: every variant that has been evaluated

Run it after `dvc repro`, on the CPU. Each variant is evaluated under each of `SETTINGS`, in a process of its own and in
a temporary folder, so that the pipeline's figures stay. Writes benchmarks/settings.csv: exact match and F1, and the
number of answers that differ from those under the first setting.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import environment, write
from firstsight.core.stage import log, main
from firstsight.core.variants import VARIANTS

ROOT = Path.cwd()
# Environment variables, and cores to use. Instruction sets that the processor does not have change nothing.
SETTINGS: dict[str, tuple[dict[str, str], int]] = {
    "as it is, 1 thread": ({}, 1),
    "as it is, 2 threads": ({}, 2),
    "ATen and oneDNN without AVX": ({"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, 1),
    "ATen and oneDNN with AVX2": ({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, 1),
    "MKL with SSE4.2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 1),
    "bitsandbytes told of AVX-512-BF16": ({"PYTHONPATH": "tests/avx512bf16"}, 1),
}


def evaluated(folder: Path, variant: str, variables: dict[str, str], threads: int) -> tuple[dict[str, Any], list[str]]:
    """Evaluate a variant in `folder` under a setting; return its quality figures and its answers."""
    code = f"import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{threads}]); "
    code += "import sys, runpy; sys.argv[0] = 'evaluate'; runpy.run_module('stages.evaluate', run_name='__main__')"
    paths = [str(ROOT / path) for path in (variables.get("PYTHONPATH"), ".") if path]
    added = variables | {"PYTHONPATH": os.pathsep.join(paths), "FIRSTSIGHT_SCRATCH": str(folder / ".scratch")}
    words = [sys.executable, "-c", code, variant]
    subprocess.run(words, cwd=folder, env=os.environ | added, check=True, stderr=subprocess.DEVNULL)
    found = folder / "evaluations" / variant
    answers = [row["answer"] for row in json.loads((found / "predictions.json").read_text(encoding="utf-8"))]
    return json.loads((found / "quality.json").read_text(encoding="utf-8")), answers


def run() -> None:
    measured = [variant for variant in VARIANTS if (ROOT / "evaluations" / variant / "performance.json").exists()]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("models", "data", "params.yaml"):
            (folder / name).symlink_to(ROOT / name)
        for variant in sys.argv[1:] or measured:
            expected: list[str] = []
            for setting, (variables, threads) in SETTINGS.items():
                quality, answers = evaluated(folder, variant, variables, threads)
                expected = expected or answers
                rows.append({
                    "variant": variant,
                    "setting": setting,
                    "exact_match": round(quality["exact_match"], 4),
                    "f1": round(quality["f1"], 4),
                    "answers_that_differ": sum(a != b for a, b in zip(answers, expected, strict=True)),
                    "questions": quality["questions"],
                    **environment("cpu"),
                })  # fmt: skip
                row = rows[-1]
                log.info("%(variant)s, %(setting)s: %(exact_match).4f, %(answers_that_differ)d answers differ", row)
    write("settings", rows)


if __name__ == "__main__":
    main(run)

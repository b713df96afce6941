"""Measure how far two evaluations of the same model differ: latency, throughput and peak memory.

    python -m benchmarks.repeat [VARIANT...]      default: every variant that has been evaluated

Run it after `dvc repro`, on an otherwise idle machine. All variants are evaluated once and then again, each in its own
process and in a temporary folder, so that the pipeline's figures stay. Writes benchmarks/repeat.csv: both runs, and the
ratio of the second to the first.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import environment, write
from firstsight.core.stage import log, main
from firstsight.core.variants import VARIANTS

ROOT = Path.cwd()
FIGURES = ("latency_ms_p50", "latency_ms_p90", "prefill_ms_p50", "decode_tokens_per_second", "peak_bytes")


def evaluated(folder: Path, variant: str) -> dict[str, float]:
    """Evaluate a variant in `folder` and return its figures; throughput is that of the largest batch."""
    words = [sys.executable, "-m", "stages.evaluate", variant]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "FIRSTSIGHT_SCRATCH": str(folder / ".scratch")}
    subprocess.run(words, cwd=folder, env=variables, check=True, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "evaluations" / variant / "performance.json").read_text())
    together = [batch["answers_per_second"] for batch in found["throughput"].values()]
    return {name: found[name] for name in FIGURES} | {"answers_per_second": together[-1]}


def run() -> None:
    measured = [variant for variant in VARIANTS if (ROOT / "evaluations" / variant / "performance.json").exists()]
    variants = sys.argv[1:] or measured
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("models", "data", "params.yaml"):
            (folder / name).symlink_to(ROOT / name)
        first, second = ({variant: evaluated(folder, variant) for variant in variants} for _ in range(2))
    rows = [
        {
            "variant": variant,
            "figure": name,
            "first": round(first[variant][name], 2),
            "second": round(second[variant][name], 2),
            "ratio": round(second[variant][name] / first[variant][name], 3),
            **environment("cuda" if torch.cuda.is_available() else "cpu"),
        }
        for variant in variants
        for name in first[variant]
    ]
    for row in rows:
        log.info("%(variant)s %(figure)s: %(first)s, then %(second)s (%(ratio)s)", row)
    write("repeat", rows)


if __name__ == "__main__":
    main(run)

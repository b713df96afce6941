"""Time a sweep of six (T, alpha) points end to end, with cached targets and with online targets.

    python -m benchmarks.sweep [EPOCHS]    after dvc repro, with its params.yaml; one epoch per point by default

Each point is a separate `distill`, as `dvc exp run -S` runs it; the cache is built once, and its time counts. Writes
benchmarks/sweep.csv: wall-clock seconds of every point, including process start, and its validation loss.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import environment, write
from firstsight.core import params, yaml12
from firstsight.core.stage import log, main
from firstsight.models.device import pick_device

POINTS = [(temperature, alpha) for temperature in (1.0, 2.0, 4.0) for alpha in (0.5, 0.9)]
LINKED = ("presets", "models/student", "models/teacher-finetuned", "data/egoqa", "data/visual-tokens")
ROOT = Path.cwd()


def stage(folder: Path, name: str) -> float:
    """Run a stage in this folder and return its seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", f"stages.{name}"], cwd=folder, env=environment, check=True)
    return time.perf_counter() - started


def run() -> None:
    epochs = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    device = pick_device(params.load().runtime.device)
    values = yaml12.load(ROOT / "params.yaml")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in LINKED:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(ROOT / path)
        for kind in ("hidden", "online"):
            values["targets"]["kind"] = kind
            (folder / "params.yaml").write_text(yaml12.dump(values))
            spent = stage(folder, "cache_teacher_targets")
            rows.append(row(kind, "cache-teacher-targets", "", "", epochs, spent, "", device))
            for temperature, alpha in POINTS:
                values["train"] |= {"temperature": temperature, "alpha": alpha, "epochs": epochs}
                (folder / "params.yaml").write_text(yaml12.dump(values))
                spent = stage(folder, "distill")
                history = json.loads((folder / "models/student-distilled/history.json").read_text())
                loss = [entry["eval_objective"] for entry in history if "eval_objective" in entry][-1]
                rows.append(row(kind, "distill", temperature, alpha, epochs, spent, f"{loss:.5g}", device))
            total = sum(entry["seconds"] for entry in rows if entry["targets"] == kind)
            log.info("%s: %.0f s for %d points", kind, total, len(POINTS))
    write("sweep", rows)


def row(kind: str, name: str, temperature, alpha, epochs: float, seconds: float, loss: str, device: str) -> dict:
    """Return a row of sweep.csv."""
    return {
        "targets": kind,
        "stage": name,
        "temperature": temperature,
        "alpha": alpha,
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "validation_loss": loss,
        **environment(device),
    }


if __name__ == "__main__":
    main(run)

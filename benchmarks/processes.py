"""Distil with 1, 2 and 4 processes: compare time, memory and validation loss.

    python -m benchmarks.processes [EPOCHS]    after dvc repro; half an epoch by default

The processes run on the CPU, with gloo, and share its cores: the times show the overhead of several processes, not the
speed-up of several machines. Memory is the peak of the sum over all processes, which counts shared pages once. Writes
benchmarks/processes.csv.
"""

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.measuring import environment, process_tree, write
from firstsight.core import yaml12
from firstsight.core.stage import log, main

LINKED = (
    *("presets", "models/student", "models/teacher-finetuned"),
    *("data/egoqa", "data/teacher-targets", "data/visual-tokens"),
)
ROOT = Path.cwd()
PROCESSES = (1, 2, 4)


def run() -> None:
    epochs = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    values = yaml12.load(ROOT / "params.yaml")
    values["train"]["epochs"] = epochs
    values["runtime"]["device"] = "cpu"
    rows = []
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for path in LINKED:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).symlink_to(ROOT / path)
            (folder / "params.yaml").write_text(yaml12.dump(values))
            # torch's launcher, because accelerate's always starts a single process on the CPU.
            launched = ["--standalone", "--nproc_per_node", str(processes), "-m", "stages.distill"]
            words = [sys.executable, "-m", "torch.distributed.run", *launched]
            variables = {"PYTHONPATH": str(ROOT), "FIRSTSIGHT_SCRATCH": str(folder / ".scratch")}
            seconds, most = process_tree(words, folder, variables)
            history = json.loads((folder / "models/student-distilled/history.json").read_text())
        loss = [entry["eval_objective"] for entry in history if "eval_objective" in entry][-1]
        first = rows[0] if rows else {"seconds": seconds, "memory_mb": most / 1e6}
        rows.append({
            "processes": processes,
            "epochs": epochs,
            "seconds": round(seconds, 1),
            "memory_mb": round(most / 1e6),
            "validation_loss": f"{loss:.5g}",
            "time_ratio": round(seconds / first["seconds"], 2),
            "memory_ratio": round(most / 1e6 / first["memory_mb"], 2),
            **environment("cpu"),
        })  # fmt: skip
        log.info("%(processes)d processes: %(seconds)s s, %(memory_mb)d MB, loss %(validation_loss)s", rows[-1])
    write("processes", rows)


if __name__ == "__main__":
    main(run)

"""Measure what a sweep over temperature and alpha costs with a frozen vision tower: running every epoch, or once.

    python -m benchmarks.look_once [SCENES]    after dvc repro, with its params.yaml and models; 200 scenes by default

The student is distilled at each of six points, for as many epochs as params.yaml says, with its visual tokens computed
in every epoch, and with them cached, in turns. All scenes are labelled, so that the teacher answers none. Stages run in
one process, without its start. Writes benchmarks/look_once.csv: seconds of CPU time of every point and of
`cache-visual-tokens`, and validation losses. Run it on one core: CPU time then is what a quiet core would take.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from benchmarks.measuring import environment, write
from firstsight.core import params, yaml12
from firstsight.core.stage import log, main
from firstsight.models.device import pick_device
from stages import build_egoqa_dataset, cache_teacher_targets, cache_visual_tokens, distill

POINTS = [(temperature, alpha) for temperature in (1.0, 2.0, 4.0) for alpha in (0.5, 0.9)]
LINKED = ("presets", "data/example.jsonl", "models/student", "models/teacher-finetuned")
ROOT = Path.cwd()


def run() -> None:
    values = params.load().model_dump()
    values["data"] |= {"source": "synthetic", "labelled_fraction": 1.0}
    values["data"]["synthetic"]["scenes"] = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    values["train"]["train_vision"] = False
    device = pick_device(values["runtime"]["device"])
    with tempfile.TemporaryDirectory() as temporary:
        for path in LINKED:
            (Path(temporary) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / path).symlink_to(ROOT / path)
        with chdir(temporary):
            rows = [row | environment(device) for row in points(values)]
    totals = {
        choice: sum(row["cpu_seconds"] for row in rows if row["visual_tokens"] == choice)
        for choice in ("computed", "cached")
    }
    log.info("%d points: %s, ratio %.2f", len(POINTS), totals, totals["computed"] / totals["cached"])
    write("look_once", rows)


def points(values: dict) -> list[dict]:
    """Build the data, then distil at each point both ways; return a row for each stage that is measured."""
    save(values)
    build_egoqa_dataset.run()
    cache_teacher_targets.run()
    first = {"visual_tokens": "cached", "stage": "cache-visual-tokens", "temperature": "", "alpha": "", "epochs": ""}
    rows = [first | {"cpu_seconds": spent(cache_visual_tokens.run), "validation_loss": ""}]
    for temperature, alpha in POINTS:
        for choice in ("computed", "cached"):
            values["train"] |= {"temperature": temperature, "alpha": alpha, "visual_tokens": choice}
            save(values)
            seconds = spent(distill.run)
            history = json.loads((distill.OUTPUT / "history.json").read_text(encoding="utf-8"))
            rows.append({
                "visual_tokens": choice,
                "stage": "distill",
                "temperature": temperature,
                "alpha": alpha,
                "epochs": values["train"]["epochs"],
                "cpu_seconds": seconds,
                "validation_loss": f"{[row['eval_objective'] for row in history if 'eval_objective' in row][-1]:.5g}",
            })  # fmt: skip
            log.info("%(visual_tokens)s, T = %(temperature)s, alpha = %(alpha)s: %(cpu_seconds).1f s", rows[-1])
    return rows


def spent(stage: Callable[[], None]) -> float:
    """Run a stage and return its seconds of CPU time."""
    started = time.process_time()
    stage()
    return round(time.process_time() - started, 2)


def save(values: dict) -> None:
    Path("params.yaml").write_text(yaml12.dump(values), encoding="utf-8")


if __name__ == "__main__":
    main(run)

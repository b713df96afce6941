"""Measure time and memory of building a data set against its size.

    python -m benchmarks.build

Small images of noise, with five questions each, go through `build-egoqa-dataset` as `dvc repro` runs it. Each row has
four times the images of the row before, so linear growth shows as a ratio of four. Memory is the peak of the summed
proportional set sizes of the process and its workers, which count shared pages once. Writes benchmarks/build.csv.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.measuring import environment, process_tree, write
from firstsight.core import yaml12
from firstsight.core.stage import log, main

PICTURES, QUESTIONS, SIDE = (1_250, 5_000, 20_000), 5, 224
ROOT = Path.cwd()


def prepare(folder: Path, pictures: int) -> None:
    """Write a workspace into `folder`: params.yaml, the images, and a file of questions about them."""
    values = yaml12.load(ROOT / "presets/smoke.yaml")
    values["data"] |= {"source": "jsonl", "path": "qa.jsonl", "max_pixels": SIDE**2}
    values["data"]["benchmark"]["path"] = "qa.jsonl"
    (folder / "params.yaml").write_text(yaml12.dump(values))
    noise = np.random.default_rng(0)
    with (folder / "qa.jsonl").open("w") as file:
        for number in range(pictures):
            coarse = Image.fromarray(noise.integers(0, 256, (14, 14, 3), dtype=np.uint8))
            coarse.resize((SIDE, SIDE)).save(folder / f"{number}.jpg")
            for question in range(QUESTIONS):
                line = {
                    "media": f"{number}.jpg",
                    "question": f"What is at {question}?",
                    "answer": f"a thing {question}",
                }
                file.write(json.dumps(line) + "\n")


def run() -> None:
    rows = []
    for pictures in PICTURES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            prepare(folder, pictures)
            words = [sys.executable, "-m", "stages.build_egoqa_dataset"]
            variables = {"PYTHONPATH": str(ROOT), "FIRSTSIGHT_SCRATCH": str(folder / ".scratch")}
            seconds, most = process_tree(words, folder, variables)
        first = rows[0] if rows else {"seconds": seconds}
        rows.append({
            "pictures": pictures,
            "records": pictures * QUESTIONS,
            "seconds": round(seconds, 1),
            "pictures_a_second": round(pictures / seconds),
            "memory_mb": round(most / 1e6),
            "size_ratio": pictures / PICTURES[0],
            "time_ratio": round(seconds / first["seconds"], 2),
            **environment("cpu"),
        })  # fmt: skip
        log.info("%(records)d records: %(seconds).0f s, %(memory_mb)d MB", rows[-1])
    write("build", rows)


if __name__ == "__main__":
    main(run)

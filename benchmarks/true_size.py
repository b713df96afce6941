"""Run the stages on Qwen2-VL-7B and 2B at true size, with random weights: compare peak memory with the plan's estimate,
and size, memory and speed of all variants.

    python -m benchmarks.true_size [PRESET]      default: presets/qwen2-vl-7b-24gb.yaml

On CUDA the models have their true sizes, in bfloat16, and vocabularies of 151,657 tokens; this takes 30 GB of disk in
$TMPDIR. On the CPU widths and vocabulary are divided by eight, and there is no comparison with the plan, which
estimates CUDA memory. The data are videos of 16 frames of 448 x 448 pixels (4 of 112 x 112 on the CPU) with one
question each; ten optimizer steps are taken.

Each stage runs in its own process. Its peak on CUDA is the most memory that torch reserved plus the CUDA context; on
the CPU it is the highest resident memory. Writes benchmarks/true-size-cuda.csv and benchmarks/variants-cuda.csv, or
-cpu.csv. A stage whose libraries are not installed is skipped with a warning.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.checkpoints import padded_tokenizer, write_random
from benchmarks.distill_step import SCALE, SHARED, config
from benchmarks.measuring import environment, write
from firstsight.acquisition.initialise import build_processor
from firstsight.core import params, yaml12
from firstsight.core.files import link_folder
from firstsight.core.stage import log, main
from firstsight.core.variants import EXPORTED, EXPORTED_TEACHER, METHODS, TEACHER, VARIANTS
from firstsight.planning import plan_table
from firstsight.planning.shapes import QWEN2_VL_2B, QWEN2_VL_7B
from firstsight.planning.workload import workload
from firstsight.records.parquet import SplitWriter
from firstsight.records.sample import Record, Sample

ROOT = Path.cwd()
STEPS = 10
# Number of frames of a video, and their side in pixels.
VIDEO = {"cpu": (4, 112), "cuda": (16, 448)}
STAGES = (
    ("cache_teacher_targets", ()),
    ("cache_visual_tokens", ()),
    ("distill", ()),
    ("finetune_student", ()),
    ("quantize_student", ("int8",)),
    ("quantize_student", ("nf4",)),
    ("quantize_student", ("int4",)),
    *(("evaluate", (variant,)) for variant in VARIANTS if variant not in (EXPORTED_TEACHER, *EXPORTED)),
)
# Ratios of teacher to INT8 student that the original design claims.
CLAIMS = {"parameters": 8.29e9 / 2.21e9, "memory": 13.8 / 4.4, "speed_up": 5.16}


def prepare(folder: Path, preset: Path, device: str) -> None:
    """Write what cache-teacher-targets reads and all later stages need: params.yaml, both models and the data."""
    divisor, (frames, side) = SCALE[device][0], VIDEO[device]
    values = yaml12.load(preset)
    values["finetune_teacher"]["enabled"] = False
    values["train"] |= {"epochs": 1, "gradient_accumulation_steps": 1, "warmup_fraction": 0.0}
    values["quantize"] |= {"methods": list(METHODS), "calibration_samples": 2}
    values["evaluate"] |= {"latency_runs": 3, "batch_size": 2, "teacher_methods": list(METHODS)}
    values["data"] |= {"max_frames": frames, "max_pixels": side**2}
    values["runtime"] = {"device": device, "data_workers": 0}
    for role in ("teacher", "student"):
        values["models"][role] = {"source": f"checkpoints/{role}", "revision": None, "init": None}
    (folder / "params.yaml").write_text(yaml12.dump(values))

    init = params.load(ROOT / "presets/from-scratch.yaml").models.student.init
    corpus = Path(init.corpus).read_text(encoding="utf-8").splitlines()
    processor = build_processor(padded_tokenizer(corpus, init.vocabulary_size, SHARED // divisor), side**2)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for role, output, sizes in (("teacher", "teacher-finetuned", QWEN2_VL_7B), ("student", "student", QWEN2_VL_2B)):
        source = folder / "checkpoints" / role
        source.mkdir(parents=True)
        write_random(config(sizes, divisor, processor.tokenizer), source, dtype)
        processor.save_pretrained(source)
        # params.yaml may not name a folder of models/ as a source, because stages replace those.
        (folder / "models" / output).mkdir(parents=True)
        link_folder(source, folder / "models" / output)

    counts = {"train": STEPS * values["train"]["batch_size"], "validation": 2, "test": 4}
    (folder / "data/egoqa").mkdir(parents=True)
    for split, count in counts.items():
        with SplitWriter(folder / f"data/egoqa/{split}.parquet") as writer:
            for number in range(count):
                writer.write(video(f"{split}-{number}", frames, side))
    splits = {split: {"samples": count, "records": count} for split, count in counts.items()}
    card = {"source": values["data"]["source"], "splits": splits}
    (folder / "data/egoqa/card.json").write_text(json.dumps(card))


def video(name: str, count: int, side: int) -> Sample:
    """Return a video of `count` frames of one colour each, with a question of about 32 tokens and an answer of 16."""
    frames = []
    for number in range(count):
        frame = BytesIO()
        Image.new("RGB", (side, side), (16 * number, 128, 255 - 16 * number)).save(frame, "JPEG")
        frames.append(frame.getvalue())
    question = "Where is the cup? " * 6
    answer = "on the left of the table " * 2
    record = Record(name, question.strip(), answer.strip(), (answer.strip(),), "open")
    return Sample(name, name, "noise", "video", tuple(frames), 2.0, (record,))


def planned(folder: Path) -> dict[str, float]:
    """Return the GPU bytes that the plan estimates, by the stage's name in the plan."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        loaded = params.load()
        rows = plan_table.rows(loaded, workload(loaded.data, params.PARAMS_FILE))
    finally:
        os.chdir(before)
    return {row.stage: row.memory.total for row in rows if row.memory}


def side_by_side(folder: Path, device: str) -> list[dict[str, Any]]:
    """Return one row per measured variant: its figures, the teacher's figures over its own, and the claimed ratios."""
    paths = {variant: folder / "evaluations" / variant / "performance.json" for variant in VARIANTS}
    found = {variant: json.loads(path.read_text()) for variant, path in paths.items() if path.exists()}
    rows = []
    for variant, own in found.items():
        largest = list(own["throughput"].items())[-1:]
        teacher = found[TEACHER]
        ratios = {
            "parameters": teacher["parameters"] / own["parameters"],
            "memory": teacher["peak_bytes"] / own["peak_bytes"],
            "speed_up": teacher["latency_ms_p50"] / own["latency_ms_p50"],
        }
        rows.append({
            "variant": variant,
            "parameters": own["parameters"],
            "weights_gb": round(own["weights_bytes"] / 1e9, 2),
            "peak_gb": round(own["peak_bytes"] / 1e9, 2),
            **{name: round(own[name], 1) for name in ("load_seconds", "prefill_ms_p50", "latency_ms_p50")},
            "latency_spread": round(own["latency_spread"], 3),
            "batch": largest[0][0] if largest else "",
            "answers_per_second": round(largest[0][1]["answers_per_second"], 2) if largest else "",
            **{f"teacher_{name}_ratio": round(ratio, 2) for name, ratio in ratios.items()},
            **{f"claimed_{name}_ratio": round(ratio, 2) for name, ratio in CLAIMS.items()},
            **environment(device),
        })  # fmt: skip
    return rows


def stage(module: str, arguments: list[str]) -> None:
    """Run a stage in this process, then print its peak memory in bytes as the last line."""
    importlib.import_module(f"stages.{module}").run(*arguments)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        print(torch.cuda.max_memory_reserved() + context)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def needs(module: str, arguments: tuple[str, ...]) -> list[str]:
    """Return the libraries of a stage that a machine for benchmarks may lack."""
    if module == "evaluate":
        return ["rouge_score", "sacrebleu", "pandas", "bitsandbytes"]
    return ["bitsandbytes"] if module == "quantize_student" else []


def run() -> None:
    if sys.argv[1:2] == ["--stage"]:
        stage(sys.argv[2], sys.argv[3:])
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    preset = Path(sys.argv[1] if len(sys.argv) > 1 else "presets/qwen2-vl-7b-24gb.yaml")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        prepare(folder, preset, device)
        log.info("wrote models and data in %.0f s", time.perf_counter() - started)
        plan = planned(folder) if device == "cuda" else {}
        for module, arguments in STAGES:
            name = " ".join([module.replace("_", "-"), *arguments])
            if missing := [library for library in needs(module, arguments) if not find_spec(library)]:
                log.warning("skipped %s: %s not installed", name, ", ".join(missing))
                continue
            started = time.perf_counter()
            words = [sys.executable, "-m", "benchmarks.true_size", "--stage", module, *arguments]
            paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            variables = os.environ | {"PYTHONPATH": paths, "FIRSTSIGHT_SCRATCH": str(folder / ".scratch")}
            done = subprocess.run(words, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=True)
            peak = int(done.stdout.splitlines()[-1])
            rows.append({
                "stage": name,
                "preset": preset.name,
                "seconds": round(time.perf_counter() - started, 1),
                "peak_gib": round(peak / 2**30, 2),
                "planned_gib": round(plan[name] / 2**30, 2) if name in plan else "",
                "ratio": round(peak / plan[name], 3) if name in plan else "",
                **environment(device),
            })  # fmt: skip
            log.info("%(stage)s: %(peak_gib)s GiB, planned %(planned_gib)s, %(seconds)s s", rows[-1])
            # Written after every stage, so that results are kept if a later stage fails.
            write(f"true-size-{device}", rows)
            if measured := side_by_side(folder, device):
                write(f"variants-{device}", measured)


if __name__ == "__main__":
    main(run)

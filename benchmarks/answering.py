"""Measure the prompt and each token of an answer at batch 1: 7B and 2B, in 16 bits and quantized.

    python -m benchmarks.answering      on CUDA where there is any, else on the CPU

On CUDA the models have the true sizes of Qwen2-VL-2B and 7B with random weights, and are asked about one picture of
448 x 448 pixels; on the CPU widths and vocabulary are divided by eight. It is measured as `evaluate` measures latency.
`limit_ms` is the time in which the device's memory moves what a token reads, by the bandwidth of a copy: what is above
it is the engine's, not the model's.

Each case runs in its own process; the file is written after each, and a case that fails is left out with a warning. On
CUDA this writes up to 17 GB to $TMPDIR. Writes benchmarks/answering-cpu.csv or -cuda.csv; ratios are to 16 bits of the
same model (float32 on the CPU).
"""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import padded_tokenizer, write_random
from benchmarks.distill_step import PRESET, SCALE, SHARED, config, scenes
from benchmarks.measuring import alone, environment, write
from firstsight.acquisition.initialise import build_processor
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.core.variants import METHODS
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.planning.shapes import QWEN2_VL_2B, QWEN2_VL_7B
from firstsight.profiling.cost import measure_latency, token_limit_ms

SIZES = {"2B": QWEN2_VL_2B, "7B": QWEN2_VL_7B}
# On CUDA the one that should be faster than 16 bits comes first: the time may not suffice for all.
PRECISIONS = {"cpu": ("float32", *METHODS), "cuda": ("bfloat16", *sorted(METHODS, key=lambda method: method != "int4"))}
TOKENS = {"cpu": 16, "cuda": 64}


def prepare(folder: Path, sizes: dict, device: str) -> None:
    """Write a checkpoint with random weights of these sizes."""
    divisor, side = SCALE[device]
    init = params.load(PRESET).models.student.init
    corpus = Path(init.corpus).read_text(encoding="utf-8").splitlines()
    processor = build_processor(padded_tokenizer(corpus, init.vocabulary_size, SHARED // divisor), side**2)
    write_random(
        config(sizes, divisor, processor.tokenizer), folder, torch.bfloat16 if device == "cuda" else torch.float32
    )
    processor.save_pretrained(folder)


def measure(folder: Path, precision: str, device: str) -> dict[str, float]:
    """Return milliseconds of the prompt and of a token, the token's limit, and the bytes of the weights."""
    loaded = params.load(PRESET)
    settings = loaded.evaluate.model_copy(update={"latency_runs": 1, "latency_new_tokens": TOKENS[device]})
    (sample,) = scenes(loaded.data, SCALE[device][1], 1)
    model = PyTorchModel(load_model(folder, precision, device), load_processor(folder), precision)
    found = measure_latency(model, [(sample, sample.records[0])], settings)
    return {
        "prompt_ms": found["prefill_ms_p50"],
        "token_ms": found["token_ms"],
        "limit_ms": token_limit_ms(model),
        "weights_gb": model.weights_bytes / 1e9,
    }


def row(size: str, precision: str, found: dict[str, float], whole: dict[str, float], device: str) -> dict[str, Any]:
    """Return a row of the CSV file; `whole` is what was found without quantization."""
    return {
        "model": size,
        "precision": precision,
        **{name: round(found[name], 3) for name in ("prompt_ms", "token_ms", "limit_ms")},
        "of_limit": round(found["limit_ms"] / found["token_ms"], 3),
        "token_ratio": round(found["token_ms"] / whole["token_ms"], 3),
        "weights_gb": round(found["weights_gb"], 3),
        "weights_ratio": round(found["weights_gb"] / whole["weights_gb"], 3),
        **environment(device),
    }


def run() -> None:
    if len(sys.argv) == 4:
        folder, precision, device = sys.argv[1:]
        print(json.dumps(measure(Path(folder), precision, device)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for size, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as temporary:
            prepare(Path(temporary), sizes, device)
            whole: dict[str, float] | None = None
            for precision in PRECISIONS[device]:
                if precision in ("int8", "nf4") and not find_spec("bitsandbytes"):
                    log.warning("%s %s: left out, because bitsandbytes is not installed", size, precision)
                    continue
                try:
                    found = alone("answering", temporary, precision, device)
                except subprocess.CalledProcessError as failure:
                    log.warning("%s %s: left out, because %s", size, precision, failure)
                    continue
                whole = whole or found
                rows.append(row(size, precision, found, whole, device))
                write(f"answering-{device}", rows)
                log.info("%(model)s %(precision)s: %(token_ms).2f ms a token, limit %(limit_ms).2f ms", rows[-1])


if __name__ == "__main__":
    main(run)

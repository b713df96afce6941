"""Measure Qwen2-VL-2B at its true size: its exports in one engine or several beside the same model in PyTorch.

    python -m benchmarks.device [DIVISOR] [ENGINE ...]      default: 1, and onnxruntime
    python -m benchmarks.device 1 onnxruntime-cuda onnxruntime-tensorrt

With a divisor of 8, widths and vocabulary are an eighth. Where an engine is one of GPUs, PyTorch runs on the GPU as
well, and the figures go to benchmarks/device-cuda.csv, else to benchmarks/device.csv. Weights are random: sizes, memory
and times are those of the real model, answers are not. Run it on an otherwise idle machine, with 21 GB of disk in
$TMPDIR and 20 GB of memory. Each model runs in its own process; one that fails is left out, with a line. `memory_mb` is
what loading and asking add to its resident memory at most (CUDA's own included), `gpu_mb` what they add to the GPU's
that is taken (without it), `load_s` the seconds until a process with its libraries can ask the model, `prefill_ms` the
time to the first token of an answer about a picture of 448 x 448 pixels, which is prepared before, and `token_ms` that
of each further token of an answer to a question without a picture. Tokens of the models that fit the memory together,
PyTorch's in bfloat16 and the exports of fewer bits, are timed in turns: `speed_up` is how many of a model's tokens come
in the time of one of PyTorch's in bfloat16, the median over the turns.
"""

import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from PIL import Image

from benchmarks.checkpoints import Draw, normal, padded_tokenizer, write_random
from benchmarks.distill_step import PRESET, SHARED, config
from benchmarks.measuring import alone, environment, write
from firstsight.acquisition.initialise import build_processor
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.engine.exported_model import ExportedModel
from firstsight.export.folder import export_folders
from firstsight.generation.answering import Question
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.planning.shapes import QWEN2_VL_2B
from firstsight.profiling.cost import folder_bytes
from firstsight.records.sample import Record, Sample

SOURCE, WEIGHTS = "checkpoint", ("float32", "int8", "w4a8")
SIDE, TOKENS, REPEATS = 448, 16, 5


def run() -> None:
    # As the benchmark calls itself, for a process of its own.
    if sys.argv[1:2] == ["export"]:
        print(json.dumps(exported(Path(sys.argv[2]))))
        return
    if sys.argv[1:2] == ["model"]:
        serve(Path(sys.argv[2]), *sys.argv[3:])
        return
    divisor, engines = int(sys.argv[1]) if sys.argv[1:] else 1, sys.argv[2:] or ["onnxruntime"]
    on_gpu = any(engine not in get_args(params.CpuEngine) for engine in engines)
    device = "cuda" if on_gpu else "cpu"
    few_bits = [(weights, engine) for engine in engines for weights in WEIGHTS[1:]]
    alone_in_memory = [(SOURCE, device, "float32"), *((WEIGHTS[0], engine) for engine in engines)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / SOURCE, divisor)
        log.info("exporting took %(seconds)d s and %(memory_mb)d MB of memory", alone("device", "export", str(folder)))
        rows: list[dict[str, Any]] = []
        for group in ([(SOURCE, device, "bfloat16"), *few_bits], *([one] for one in alone_in_memory)):
            for _ in compared(folder, group, rows):
                write("device-cuda" if on_gpu else "device", rows)


def compared(folder: Path, cases: Sequence[tuple[str, ...]], rows: list[dict[str, Any]]) -> Iterator[None]:
    """Add a row for each model, then time tokens of all in turns; yield whenever the rows have changed.

    Each of `cases` is a model's folder within `folder`, its engine or PyTorch's device, and PyTorch's precision.
    """
    with ExitStack() as stack:
        running = []
        for name, *engine in cases:
            process = stack.enter_context(Asked(folder / name, *engine))
            if (row := process.measures()) is None:
                log.warning("%s in %s: left out, its process ended with status %d", name, engine[0], process.status())
                continue
            rows.append(row)
            log.info("%s", row)
            running.append((process, row))
            yield
        if len(running) < 2 or running[0][1]["precision"] != "bfloat16":
            return
        # A process that ends has nan from then on, and so has what is compared with it.
        turns = [[process.token_ms() for process, _ in running] for _ in range(REPEATS)]
        for (_, row), own in zip(running, zip(*turns, strict=True), strict=True):
            row["token_ms"] = round(statistics.median(own), 1)
            row["speed_up"] = round(
                statistics.median(first / one for (first, *_), one in zip(turns, own, strict=True)), 2
            )
            log.info("in turns: %(engine)s, %(precision)s: %(token_ms)s ms a token, speed-up %(speed_up)s", row)
        yield


class Asked:
    """A process that measures a model, and then times its tokens as often as it is asked to."""

    def __init__(self, *words: Any):
        command = [sys.executable, "-m", "benchmarks.device", "model", *map(str, words)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # which closes its input, and so ends it

    def measures(self) -> dict[str, Any] | None:
        """Return the row that it measures; None if it ended before."""
        return self._answer()

    def token_ms(self) -> float:
        """Return the milliseconds of a further token; nan if it has ended."""
        with suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        found = self._answer()
        return math.nan if found is None else found

    def _answer(self) -> Any:
        """Return its next line of JSON, or None if it has ended; libraries may print others."""
        for line in self._process.stdout:
            with suppress(json.JSONDecodeError):
                return json.loads(line)
        return None

    def status(self) -> int:
        """Return the status with which it ended."""
        return self._process.wait()


def write_model(folder: Path, divisor: int, draw: Draw = normal) -> None:
    """Write Qwen2-VL-2B with random weights, its widths and vocabulary divided, and a processor, as a hub has them."""
    init = params.load(PRESET).models.student.init
    corpus = Path(init.corpus).read_text(encoding="utf-8").splitlines()
    processor = build_processor(padded_tokenizer(corpus, init.vocabulary_size, SHARED // divisor), SIDE**2)
    folder.mkdir()
    write_random(config(QWEN2_VL_2B, divisor, processor.tokenizer), folder, torch.bfloat16, draw)
    processor.save_pretrained(folder)


def question(side: int | None) -> Question:
    """Return a question of about 32 tokens about a picture with this side in pixels, or about none."""
    picture = BytesIO()
    if side is not None:
        Image.radial_gradient("L").resize((side, side)).convert("RGB").save(picture, "JPEG")
    text = ("Where is the cup? " * 6).strip()
    record = Record("one", text, "on the table", ("on the table",), "open")
    frames = () if side is None else (picture.getvalue(),)
    return Sample("one", "one", "device", "none" if side is None else "image", frames, 0.0, (record,)), record


def exported(folder: Path) -> dict[str, float]:
    """Export the model with weights of each kind; return the seconds that this took, and its memory."""
    started = time.perf_counter()
    pick_device("cpu")
    for weights in WEIGHTS:
        (folder / weights).mkdir()
    export_folders(folder / SOURCE, {weights: folder / weights for weights in WEIGHTS}, [question(SIDE)])
    return {"seconds": round(time.perf_counter() - started), "memory_mb": peak_mb()}


def serve(folder: Path, engine: str, precision: str = "") -> None:
    """Load a model, ask it, and print a row: an export in an engine, or with a precision, PyTorch on a device.

    Then print the milliseconds of a further token for each line that is read.
    """
    device = engine if precision else "cpu" if engine in get_args(params.CpuEngine) else "cuda"
    pick_device(device)
    before, taken, started = psutil.Process().memory_info().rss, gpu_bytes(device), time.perf_counter()
    if precision:
        model: Any = PyTorchModel(load_model(folder, precision, device), load_processor(folder), precision)
        check = {"logit_difference": "", "same_answer": ""}
    else:
        model = ExportedModel(folder, engine)
        found = model.layout.check
        check = {"logit_difference": f"{found.logit_difference:.1e}", "same_answer": found.same_answers == 1}
    loaded = time.perf_counter() - started
    seen, read = model.inputs([question(SIDE)]), model.inputs([question(None)])

    def milliseconds(inputs: Any, tokens: int) -> float:
        begun = time.perf_counter()
        model.generate(inputs, tokens)
        return 1000 * (time.perf_counter() - begun)

    for inputs in (seen, read):
        milliseconds(inputs, 2)  # warms up
    prefill = repeated(lambda: milliseconds(seen, 1))

    def token_ms() -> float:
        return (milliseconds(read, 1 + TOKENS) - milliseconds(read, 1)) / TOKENS

    row = {
        **{key: model.environment()[key] for key in ("engine", "precision")},
        "disk_mb": round(folder_bytes(folder) / 1e6),
        "memory_mb": peak_mb() - round(before / 1e6),
        "gpu_mb": round((gpu_bytes(device) - taken) / 1e6) if device == "cuda" else "",
        "load_s": round(loaded, 1),
        "prefill_ms": round(prefill),
        "token_ms": round(repeated(token_ms), 1),
        "speed_up": "",
        **check,
        **environment(device),
    }
    print(json.dumps(row), flush=True)
    for _ in sys.stdin:
        print(json.dumps(token_ms()), flush=True)


def repeated(measure: Callable[[], float]) -> float:
    """Return the median of what is measured, as often as a minute allows and at most `REPEATS` times, at least once."""
    started, found = time.perf_counter(), [measure()]
    while len(found) < REPEATS and time.perf_counter() - started < 60:
        found.append(measure())
    return statistics.median(found)


def gpu_bytes(device: str) -> int:
    """Return how much of the GPU's memory all processes have taken, in bytes; nothing where the device is the CPU."""
    if device == "cpu":
        return 0
    free, whole = torch.cuda.mem_get_info()
    return whole - free


def peak_mb() -> int:
    """Return the most memory that this process has had, in MB; getrusage counts that of the one that started it too."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return round(int(kilobytes) * 1024 / 1e6)


if __name__ == "__main__":
    main(run)

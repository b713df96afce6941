"""Compare exported models with the PyTorch models that they were made from: answers, logits, speed, size and memory.

    python -m benchmarks.exported [SHARE]      default: all test questions; 0.1 takes a tenth

Run it after `dvc repro`, on an otherwise idle machine. Writes benchmarks/exported.csv. Exports run in onnxruntime, in
OpenVINO where it is installed, and with the providers for GPUs that onnxruntime has. A model and its exports are in one
process with the same number of threads and are timed in turns, so that what disturbs the machine disturbs each of them.
A timed answer has `evaluate.latency_new_tokens` tokens; images and videos are prepared before. `ask_mb` is the most
memory that `firstsight ask` is seen to have, five times a second, pages that others share in part.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.measuring import environment, process_tree, write
from firstsight.core import params
from firstsight.core.errors import UserError
from firstsight.core.stage import log, main
from firstsight.core.variants import DISTILLED, EXPORTED, EXPORTED_TEACHER, LEFT_OUT, TEACHER, VARIANTS
from firstsight.engine.exported_model import ExportedModel
from firstsight.evaluation.metrics import is_right
from firstsight.generation.answering import Question, model_inputs
from firstsight.generation.pytorch_model import PyTorchModel
from firstsight.models.device import pick_device
from firstsight.models.loading import load_model
from firstsight.models.processors import load_processor
from firstsight.profiling.cost import folder_bytes, representative
from firstsight.records.parquet import Split

TEST = Path("data/egoqa/test.parquet")
# What each export was made from.
ORIGINALS = {EXPORTED_TEACHER: TEACHER} | dict.fromkeys(EXPORTED, DISTILLED)
# Questions that are timed, and how often; questions whose logits are compared.
TIMED, REPEATS, LOGITS = 20, 15, 100
BATCHES = (1, 4, 64)


def run() -> None:
    settings = params.load().evaluate
    share = float(sys.argv[1]) if sys.argv[1:] else 1.0
    asked = [(sample, record) for sample in Split(TEST) for record in sample.records]
    asked = asked[:: round(1 / share)]
    pick_device("cpu")
    rows = []
    for original in dict.fromkeys(ORIGINALS.values()):
        rows += compared(original, asked, settings)
    write("exported", rows)


def in_engines(folder: Path) -> dict[str, ExportedModel]:
    """Return the exported model in each engine that runs here; say why others do not."""
    found = {}
    for engine in get_args(params.Engine):
        try:
            found[engine] = ExportedModel(folder, engine)
        except UserError as error:
            log.warning("%s: left out: %s", engine, error)
    return found


def compared(original: str, asked: Sequence[Question], settings: params.Evaluate) -> list[dict[str, Any]]:
    """Return a row for a model in PyTorch, and one for each of its exports in each engine."""
    processor = load_processor(VARIANTS[original].model)
    torch_model = load_model(VARIANTS[original].model, "float32", "cpu")
    exports = [name for name, of in ORIGINALS.items() if of == original]
    reference = original, None
    models: dict[tuple[str, str | None], Any] = {reference: PyTorchModel(torch_model, processor, "float32")}
    for name in exports:
        if not (VARIANTS[name].model / LEFT_OUT).exists():
            models |= {(name, engine): model for engine, model in in_engines(VARIANTS[name].model).items()}
    timings = timed(models, representative(asked, TIMED), settings.latency_new_tokens)
    limit = settings.asked_tokens()
    expected = list(models[reference].answers(asked, settings.batch_size, limit))
    logits = [
        torch_model(**model_inputs(processor, [one], "cpu"), logits_to_keep=1).logits[:, -1].detach().numpy()
        for one in representative(asked, LOGITS)
    ]
    rows = []
    for (name, engine), model in models.items():
        differences = [0.0]
        answered = expected
        found = {}
        if engine is not None:
            found = {size: list(model.answers(asked, size, limit)) for size in BATCHES}
            answered = found[BATCHES[0]]
            pairs = zip(logits, representative(asked, LOGITS), strict=True)
            differences = [float(np.abs(model.first_logits(model.inputs([one])) - those).max()) for those, one in pairs]
        right = [is_right(record, answer) for (_, record), answer in zip(asked, answered, strict=True)]
        row = {
            "variant": name,
            **{key: model.environment()[key] for key in ("engine", "precision")},
            "questions": len(asked),
            "exact_match": round(float(np.mean(right)), 4),
            **{f"same_batch_{size}": same(found.get(size, expected), expected) for size in BATCHES},
            "logit_difference": f"{max(differences):.1e}",
            "latency_ms": round(float(np.median(timings[name, engine])), 2),
            "speed_up": round(float(np.median(timings[reference]) / np.median(timings[name, engine])), 2),
            "disk_mb": round(folder_bytes(VARIANTS[name].model) / 1e6, 3),
            "ask_mb": round(ask_bytes(VARIANTS[name].model, asked[0], engine) / 1e6),
            **environment("cpu" if engine in (None, *get_args(params.CpuEngine)) else "cuda"),
        }
        log.info("%s", row)
        rows.append(row)
    return rows


def same(answers: Sequence[str], expected: Sequence[str]) -> int:
    return sum(one == other for one, other in zip(answers, expected, strict=True))


def timed(models: dict[Any, Any], asked: Sequence[Question], tokens: int) -> dict[Any, list[float]]:
    """Return, by the models' keys, the milliseconds of each question: the median of its repeats."""
    inputs = {name: [model.inputs([question]) for question in asked] for name, model in models.items()}
    taken = {name: np.zeros((REPEATS, len(asked))) for name in models}
    for repeat in range(-1, REPEATS):  # the first warms up
        for number in range(len(asked)):
            for name, model in models.items():
                started = time.perf_counter()
                model.generate(inputs[name][number], tokens)
                if repeat >= 0:
                    taken[name][repeat, number] = 1000 * (time.perf_counter() - started)
    return {name: np.median(those, axis=0).tolist() for name, those in taken.items()}


def ask_bytes(folder: Path, question: Question, engine: str | None) -> int:
    """Return the memory of `firstsight ask` at its peak, in bytes, as a question about an image is answered."""
    with tempfile.TemporaryDirectory() as temporary:
        (path := Path(temporary) / "picture.jpg").write_bytes(question[0].frames[0])
        words = [sys.executable, "-m", "firstsight", "ask", str(folder), str(path), question[1].question]
        words += ["--engine", engine] if engine else []
        return process_tree(words, Path.cwd(), {})[1]


if __name__ == "__main__":
    main(run)

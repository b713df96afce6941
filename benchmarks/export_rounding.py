"""Compare ways to round an exported decoder's weights to 4 bits: to the nearest, AWQ, GPTQ, and both balanced.

    python -m benchmarks.export_rounding [SHARE]      default: all test questions; 0.1 takes a tenth

Run it after `dvc repro`, which makes models/student-onnx. Weights are rounded, and restored to float32, so that nothing
else differs. Two models are measured: the exported student, and a model of as many layers as Qwen2-VL-2B, an eighth as
wide, whose random weights have what makes rounding hard: columns that hang together, and a few inputs that are far
larger than the others. Errors |x W' - x W| / |x W| are means over matrices, for visual and for text tokens apart.
*Balanced* counts the mean of visual and that of text tokens alike, however many there are of each. Of the student,
`divergence` is the Kullback-Leibler divergence of the answers' first tokens from those of the float32 graphs; the
answers of the other model say nothing. Writes benchmarks/export_rounding.csv.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from benchmarks.checkpoints import normal
from benchmarks.device import write_model
from benchmarks.measuring import environment, write
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.core.variants import VARIANTS
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import DECODER
from firstsight.evaluation.metrics import is_right
from firstsight.export.calibration import Moment, Moments, moments
from firstsight.export.folder import export_folders, spread_questions
from firstsight.export.weights import BLOCK
from firstsight.generation.answering import Question
from firstsight.models.device import pick_device
from firstsight.models.rounding import gptq, nearest, restored
from firstsight.records.parquet import Split

STUDENT, TRAIN, TEST = VARIANTS["student-onnx"].model, Path("data/egoqa/train.parquet"), Path("data/egoqa/test.parquet")
# Questions by which weights are rounded: of the student, as many as of a stage; of the larger model.
QUESTIONS, LARGER_QUESTIONS = 128, 32
# Most tokens of an answer of theirs; test questions whose first token's logits are compared.
TOKENS, COMPARED = 8, 320
# AWQ raises the size of each input to these powers.
POWERS = np.linspace(0, 1, 11)

Way = Callable[[np.ndarray, Moments], np.ndarray]


def plain(found: Moments) -> np.ndarray:
    """Return the mean of x x^T [K, K] over all tokens."""
    return (found.visual.total + found.text.total) / found.tokens


def awq(weights: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """Scale rows by the size of their inputs before they are rounded to the nearest (AWQ, arXiv 2306.00978)."""
    size = np.sqrt(np.diag(moment)).clip(1e-6)[:, None]
    size = size / np.exp(np.log(size).mean())
    tried = [restored(*nearest(weights * size**power, BLOCK), BLOCK) / size**power for power in POWERS]
    errors = [np.sum((one - weights) * (moment @ (one - weights))) for one in tried]
    return tried[int(np.argmin(errors))]


WAYS: dict[str, Way] = {
    "to the nearest": lambda weights, _: restored(*nearest(weights, BLOCK), BLOCK),
    "AWQ": lambda weights, found: awq(weights, plain(found)),
    "AWQ, balanced": lambda weights, found: awq(weights, found.balanced()),
    "GPTQ": lambda weights, found: restored(*gptq(weights, plain(found), BLOCK), BLOCK),
    "GPTQ, balanced": lambda weights, found: restored(*gptq(weights, found.balanced(), BLOCK), BLOCK),
}


def run() -> None:
    pick_device("cpu")
    share = float(sys.argv[1]) if sys.argv[1:] else 1.0
    asked = [(sample, record) for sample in Split(TEST) for record in sample.records][:: round(1 / share)]
    with tempfile.TemporaryDirectory() as temporary:
        # DVC links the folder's files to its cache, and onnx opens none that have several links.
        student = Path(shutil.copytree(STUDENT, Path(temporary) / "student"))
        rows = compared("the exported student", student, spread_questions(TRAIN, QUESTIONS), asked)
        source, target = Path(temporary) / "source", Path(temporary) / "target"
        write_model(source, 8, structured)
        target.mkdir()
        export_folders(source, {"float32": target}, [])
        rows += compared("28 layers, random", target, spread_questions(TRAIN, LARGER_QUESTIONS), [])
    write("export_rounding", rows)


def structured(shape: tuple[int, ...], norm: bool, generator: torch.Generator) -> torch.Tensor:
    """Return random weights of which a part has a low rank; 1% of a norm's make their inputs ten times as large."""
    if norm:
        weights = torch.exp(0.6 * torch.randn(shape, generator=generator))
        weights[torch.randperm(len(weights), generator=generator)[: max(1, len(weights) // 100)]] *= 10
        return weights
    if len(shape) != 2:
        return normal(shape, norm, generator)
    rank = max(1, min(shape) // 8)
    low = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    rows = torch.exp(0.3 * torch.randn(shape[0], 1, generator=generator))
    return (low / rank**0.5 + torch.randn(shape, generator=generator)) * rows * (0.5 / shape[1]) ** 0.5


def compared(name: str, folder: Path, calibration: Sequence[Question], asked: Sequence[Question]) -> list[dict]:
    """Return a row for each way to round the decoder in `folder`."""
    graph = onnx.load(folder / DECODER)
    whole = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
    rounded: dict[str, dict[str, np.ndarray]] = {way: {} for way in WAYS}
    errors: dict[str, list[tuple[float | None, float | None]]] = {way: [] for way in WAYS}
    for found in moments(folder, calibration, TOKENS)[DECODER]:
        for matrix in found.matrices:
            weights = whole[matrix.input[1]]
            for way, rounding in WAYS.items():
                changed = rounding(weights, found).astype(np.float32)
                rounded[way][matrix.input[1]] = changed
                kinds: tuple[Moment, Moment] = (found.visual, found.text)
                errors[way].append(tuple(kind.error(weights, changed - weights) for kind in kinds))
    rows = []
    for way, matrices in rounded.items():
        visual, text = ([one for one in kind if one is not None] for kind in zip(*errors[way], strict=True))
        answered = answers(folder, graph, matrices, asked) if asked else dict.fromkeys(("exact_match", *ANSWERED), "")
        row = {
            "model": name,
            "weights": way,
            "visual_error": round(float(np.mean(visual)), 4),
            "text_error": round(float(np.mean(text)), 4),
            **answered,
            **environment("cpu"),
        }
        log.info("%s", row)
        rows.append(row)
    return rows


ANSWERED = ("same_answers", "questions", "divergence")


def answers(
    folder: Path, graph: onnx.ModelProto, matrices: dict[str, np.ndarray], asked: Sequence[Question]
) -> dict[str, Any]:
    """Ask the model with these matrices, and without; return how its answers and logits differ."""
    settings = params.load().evaluate
    with tempfile.TemporaryDirectory() as temporary:
        changed = Path(shutil.copytree(folder, Path(temporary) / "model"))
        (changed / f"{DECODER}.data").unlink()
        model = onnx.ModelProto()
        model.CopyFrom(graph)
        for one in model.graph.initializer:
            if one.name in matrices:
                one.CopyFrom(numpy_helper.from_array(matrices[one.name], one.name))
        onnx.save_model(model, changed / DECODER, save_as_external_data=True, location=f"{DECODER}.data")
        models = ExportedModel(folder), ExportedModel(changed)
        expected, found = (list(one.answers(asked, settings.batch_size, TOKENS)) for one in models)
        first = asked[:COMPARED]
        before, after = (log_softmax(one.first_logits(one.inputs(first))) for one in models)
    right = [is_right(record, answer) for (_, record), answer in zip(asked, found, strict=True)]
    return {
        "exact_match": round(float(np.mean(right)), 4),
        "same_answers": sum(one == other for one, other in zip(expected, found, strict=True)),
        "questions": len(asked),
        "divergence": f"{np.mean(np.sum(np.exp(before) * (before - after), axis=1)):.2e}",
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main(run)

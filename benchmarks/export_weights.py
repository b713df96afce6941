"""Compare ways to store an exported student's weights in 8 and 4 bits, by the answers to the test questions.

    python -m benchmarks.export_weights [SHARE]      default: all test questions; 0.1 takes a tenth

Run it after `dvc repro`, which makes models/student-onnx. Writes benchmarks/export_weights.csv: exact match, how many
answers are those of the float32 graphs, and the megabytes of the graphs.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.measuring import environment, write
from firstsight.core import params
from firstsight.core.stage import log, main
from firstsight.core.variants import VARIANTS
from firstsight.engine.exported_model import ExportedModel
from firstsight.engine.layout import DECODER, VISION
from firstsight.evaluation.metrics import is_right
from firstsight.export import weights
from firstsight.profiling.cost import folder_bytes
from firstsight.records.parquet import Split

TEST = Path("data/egoqa/test.parquet")
FLOAT = VARIANTS["student-onnx"].model
BLOCKS = (32, 64, 128)
# Bits of the decoder's matrices and of the vision tower's, 32 for float32; embeddings have 8.
BITS = ((8, 32), (8, 8), (4, 32), (4, 8), (4, 4))


def ways() -> dict[str, Callable[[Path, Path], None]]:
    """Return, by its name, what changes a copy of a folder of float32 graphs, given the folder too."""
    found: dict[str, Callable[[Path, Path], None]] = {"float32": lambda *_: None}
    for graphs in ((DECODER,), (DECODER, VISION)):
        found[f"dynamic int8, {' and '.join(graphs)}"] = lambda *folders, graphs=graphs: dynamic(*folders, graphs)
    for block in BLOCKS:
        for decoder, vision in BITS:
            name = f"decoder {decoder} bits, vision {vision} bits, blocks of {block}"
            found[name] = lambda *folders, bits=(decoder, vision), block=block: in_blocks(*folders, *bits, block)
    return found


def dynamic(folder: Path, source: Path, graphs: tuple[str, ...]) -> None:
    """Store matrices in int8 with a scale for each column, by onnxruntime's dynamic quantization."""
    for name in graphs:
        (folder / f"{name}.data").unlink()
        quantize_dynamic(
            source / name,
            folder / name,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul"],
            use_external_data_format=True,
        )


def in_blocks(folder: Path, source: Path, decoder: int, vision: int, block: int) -> None:
    """Store matrices as the exports do, with other numbers of bits and other blocks."""
    bits = {DECODER: decoder, VISION: vision}
    weights.BITS["tried"] = {name: some for name, some in bits.items() if some < 32}
    weights.BLOCK = block
    weights.quantize_graphs(source, folder, "tried")


def run() -> None:
    settings = params.load().evaluate
    share = float(sys.argv[1]) if sys.argv[1:] else 1.0
    asked = [(sample, record) for sample in Split(TEST) for record in sample.records][:: round(1 / share)]
    rows, expected = [], []
    for name, make in ways().items():
        with tempfile.TemporaryDirectory() as temporary:
            # DVC links the folder's files to its cache, and onnx opens none that have several links.
            source, folder = (Path(shutil.copytree(FLOAT, Path(temporary) / name)) for name in ("source", "model"))
            make(folder, source)
            answers = list(ExportedModel(folder).answers(asked, settings.batch_size, settings.asked_tokens()))
            megabytes = folder_bytes(folder) / 1e6
        expected = expected or answers
        right = [is_right(record, answer) for (_, record), answer in zip(asked, answers, strict=True)]
        row = {
            "weights": name,
            "questions": len(asked),
            "exact_match": round(float(np.mean(right)), 4),
            "same_answers": sum(one == other for one, other in zip(answers, expected, strict=True)),
            "disk_mb": round(megabytes, 3),
            **environment("cpu"),
        }
        log.info("%(weights)s: exact match %(exact_match)s, %(same_answers)d answers the same, %(disk_mb)s MB", row)
        rows.append(row)
    write("export_weights", rows)


if __name__ == "__main__":
    main(run)

"""Store the weights of exported graphs in 8 or 4 bits; products are then computed in int8.

8 bits are rounded to the nearest, 4 by their inputs.

`MatMulNBits`, an operator of onnxruntime, holds blocks of a matrix with a scale each; at accuracy level 4 it rounds
activations to int8, block by block, as they come, and multiplies integers. docs/export.md has the figures by which it
was preferred to onnxruntime's dynamic quantization, whose answers are further from the model's.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from firstsight.engine.layout import DECODER, EMBEDDINGS, ENCODER, VISION, LayerError
from firstsight.export.calibration import Moments
from firstsight.models.rounding import gptq, nearest, packed, restored

# It tells of every node.
logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)

# Bits of each graph's matrices.
BITS = {"int8": {VISION: 8, DECODER: 8, ENCODER: 8}, "w4a8": {VISION: 4, DECODER: 4, ENCODER: 4}}
# Weights that share a scale.
BLOCK = 64
# Of MatMulNBits: activations in int8.
_INT8 = 4


def quantize_graphs(source: Path, target: Path, weights: str) -> None:
    """Write the float32 graphs in `source` into the folder `target`, with weights that are "int8" or "w4a8"."""
    for name, bits in BITS[weights].items():
        if (source / name).exists():
            config = DefaultWeightOnlyQuantConfig(
                block_size=BLOCK, is_symmetric=True, accuracy_level=_INT8, bits=bits, op_types_to_quantize=("MatMul",)
            )
            quantizer = MatMulNBitsQuantizer(onnx.load(source / name), algo_config=config)
            quantizer.process()
            quantized = quantizer.model.model
            if name == ENCODER:
                _look_up_in_int8(quantized.graph)
            _save(quantized, target / name)
    if (source / EMBEDDINGS).exists():
        _save(_embeddings(onnx.load(source / EMBEDDINGS)), target / EMBEDDINGS)


def round_by_inputs(source: Path, target: Path, name: str, found: Iterable[Moments]) -> dict[str, LayerError]:
    """Round the 4-bit weights of the graph `name` in `target` again, by the inputs that they are multiplied with.

    A matrix that fewer tokens passed than it has rows stays rounded to the nearest: its inputs say too little.

    Args:
        source: the folder of the float32 graphs.
        found: the moments of all of the graph's inputs, as `calibration.moments` yields them.

    Returns the errors of each matrix, by the name of its node.
    """
    whole = {one.name: one for one in onnx.load(source / name, load_external_data=False).graph.initializer}
    model = onnx.load(target / name)
    stored = {one.name: one for one in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    errors = {}
    for moments in found:
        for matrix in moments.matrices:
            weights = numpy_helper.to_array(whole[matrix.input[1]], base_dir=str(source))
            levels, scales = plain = nearest(weights, BLOCK)
            if moments.tokens >= len(weights):
                levels, scales = gptq(weights, moments.balanced(), BLOCK)
            _, *inputs = nodes[f"{matrix.name}_Q4"].input
            for one, values in zip(inputs, (packed(levels, BLOCK), np.ascontiguousarray(scales.T)), strict=True):
                stored[one].CopyFrom(numpy_helper.from_array(values, one))
            change, before = restored(levels, scales, BLOCK) - weights, restored(*plain, BLOCK) - weights
            errors[matrix.name] = LayerError(
                visual=moments.visual.error(weights, change),
                text=moments.text.error(weights, change),
                visual_nearest=moments.visual.error(weights, before),
                text_nearest=moments.text.error(weights, before),
            )
    _save(model, target / name)
    return errors


def _embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph that looks rows up in int8, and multiplies each by its scale."""
    (table,) = (numpy_helper.to_array(one) for one in model.graph.initializer)
    (tokens,), (embeddings,) = model.graph.input, model.graph.output
    nodes, weights = _rows_in_int8(table, tokens.name, embeddings.name)
    graph = helper.make_graph(nodes, "embeddings", [tokens], [embeddings], weights)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _look_up_in_int8(graph: onnx.GraphProto) -> None:
    """Store the embeddings of an encoder's graph, which are tables that it looks rows up in, as those of `_embeddings`.

    One table of tokens and one of their positions are looked up, and often one of the parts of a text.
    """
    tables = {one.name: one for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    nodes = []
    for node in graph.node:
        table = tables.pop(node.input[0], None) if node.op_type == "Gather" else None
        if table is None:
            nodes.append(node)
            continue
        found, weights = _rows_in_int8(numpy_helper.to_array(table), node.input[1], node.output[0], f"{table.name}.")
        nodes += found
        graph.initializer.remove(table)
        graph.initializer.extend(weights)
    del graph.node[:]
    graph.node.extend(nodes)


def _rows_in_int8(
    table: np.ndarray, rows: str, found: str, prefix: str = ""
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes that look rows of a table up in int8, and multiply each by its scale; and their weights.

    `rows` and `found` are the names of the rows' numbers and of the result; others begin with `prefix`.
    """
    scales = np.abs(table).max(axis=1, keepdims=True).clip(np.finfo(np.float32).tiny) / np.float32(127)
    levels = np.rint(table / scales).astype(np.int8)
    nodes = [
        helper.make_node("Gather", [f"{prefix}table", rows], [f"{prefix}rows"]),
        helper.make_node("Gather", [f"{prefix}scales", rows], [f"{prefix}row_scales"]),
        helper.make_node("Cast", [f"{prefix}rows"], [f"{prefix}levels"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{prefix}levels", f"{prefix}row_scales"], [found]),
    ]
    weights = [numpy_helper.from_array(levels, f"{prefix}table"), numpy_helper.from_array(scales, f"{prefix}scales")]
    return nodes, weights


def _save(model: onnx.ModelProto, path: Path) -> None:
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)  # onnx would append to it
    onnx.save_model(model, path, save_as_external_data=True, location=weights.name)
    weights.chmod(path.stat().st_mode)  # onnx makes it private

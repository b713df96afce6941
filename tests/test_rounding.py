"""4-bit weights: rounded to the nearest as onnxruntime does, and by their inputs (GPTQ) with a smaller error."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from firstsight.engine.layout import DECODER, VISION, read_layout
from firstsight.export.calibration import Moment
from firstsight.models.rounding import gptq, nearest, packed, restored

BLOCK = 64


@pytest.fixture
def weights() -> np.ndarray:
    """A matrix whose rows are no multiple of a block, with a column of zeros."""
    found = np.random.default_rng(0).normal(size=(96, 24)).astype(np.float32)
    found[:, 3] = 0
    return found


@pytest.fixture
def inputs() -> np.ndarray:
    """Inputs [n, 96] that hang together, of which some are far larger than others, as those of a language model."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(500, 20)) @ rng.normal(size=(20, 96)) * rng.lognormal(0, 1, 96)).astype(np.float32)


def test_rounding_to_the_nearest_is_onnxruntimes(weights):
    given, made = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    graph = helper.make_graph([node], "one", [given], [made], [numpy_helper.from_array(weights, "w")])
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=4)
    quantizer = MatMulNBitsQuantizer(helper.make_model(graph), algo_config=config)
    quantizer.process()
    found = {one.name: numpy_helper.to_array(one) for one in quantizer.model.model.graph.initializer}
    levels, scales = nearest(weights, BLOCK)
    used = [number for number in range(24) if number != 3]  # any scale is right for zeros
    # Two of the 96 rows in a byte; onnxruntime leaves the rest of the last block as it comes.
    ours, theirs = (one.reshape(24, -1)[used, :48] for one in (packed(levels, BLOCK), found["w_Q4"]))
    assert np.array_equal(ours, theirs)
    assert np.allclose(scales.T[used], found["w_scales"].reshape(24, 2)[used], rtol=1e-6)
    assert not restored(levels, scales, BLOCK)[:, 3].any()


def test_weights_are_rounded_to_the_nearest_where_inputs_are_independent(weights):
    for found, expected in zip(gptq(weights, np.eye(96), BLOCK), nearest(weights, BLOCK), strict=True):
        assert np.array_equal(found, expected)


def test_weights_that_are_rounded_by_their_inputs_change_products_less(weights, inputs):
    moment = Moment(np.zeros((96, 96), np.float32))
    moment.add(inputs)

    def error(levels: np.ndarray, scales: np.ndarray) -> float:
        change = restored(levels, scales, BLOCK) - weights
        expected = np.linalg.norm(inputs @ change) / np.linalg.norm(inputs @ weights)
        assert moment.error(weights, change) == pytest.approx(expected, rel=1e-3)
        return expected

    assert error(*gptq(weights, moment.total / moment.tokens, BLOCK)) < 0.4 * error(*nearest(weights, BLOCK))


def test_inputs_of_no_use_change_nothing(weights):
    for found, expected in zip(gptq(weights, np.zeros((96, 96)), BLOCK), nearest(weights, BLOCK), strict=True):
        assert np.array_equal(found, expected)


def test_an_export_holds_the_error_of_each_matrix_by_kind_of_token(smoke):
    folder = smoke / "models/student-onnx-w4a8"
    errors = read_layout(folder).errors
    nodes = [
        node for name in (VISION, DECODER) for node in onnx.load(folder / name, load_external_data=False).graph.node
    ]
    assert {f"{name}_Q4" for name in errors} == {node.name for node in nodes if node.op_type == "MatMulNBits"}
    assert {"head", "language_model.layers.0.self_attn.q_proj", "tower.blocks.0.mlp.fc2"} < errors.keys()
    inner = [one for name, one in errors.items() if name != "head"]
    for kind in ("visual", "text"):
        rounded, plain = (
            np.mean([value for one in inner if (value := getattr(one, kind + end)) is not None])
            for end in ("", "_nearest")
        )
        assert 0 < rounded < 0.8 * plain < 0.2
    # What answers are made of, the last token's state, is text.
    assert errors["head"].visual is None

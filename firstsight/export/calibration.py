"""Measure by what an exported decoder's matrices are multiplied, as it reads questions and gives its answers.

Visual and text tokens are counted apart, because their inputs differ in size and in number, and a rounding that is
good for the one can be poor for the other (arXiv 2412.19509).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import onnx
import onnxruntime
from onnx import NodeProto, helper

from firstsight.core.progress import progress
from firstsight.engine.class_scores import open_exported
from firstsight.engine.layout import DECODER, ENCODER, VISION
from firstsight.engine.prompts import Question
from firstsight.models.rounding import parts


@dataclass
class Moment:
    """Hold the sum of x x^T [K, K] over the inputs x of `tokens` tokens."""

    total: np.ndarray
    tokens: int = 0

    def add(self, inputs: np.ndarray) -> None:
        """Add inputs [n, K]."""
        self.total += inputs.T @ inputs
        self.tokens += len(inputs)

    def error(self, weights: np.ndarray, change: np.ndarray) -> float | None:
        """Return |x change| / |x weights| over all tokens, both matrices [K, N]; None where there are no tokens."""
        if not self.tokens:
            return None
        return float(np.sqrt(np.sum(change * (self.total @ change)) / np.sum(weights * (self.total @ weights))))


@dataclass
class Moments:
    """Hold the moments of the inputs of `matrices`, nodes that share their input, by modality."""

    matrices: list[NodeProto]
    visual: Moment
    text: Moment

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return self.visual.tokens + self.text.tokens

    def balanced(self) -> np.ndarray:
        """Return the mean of x x^T [K, K], in which visual and text tokens weigh the same, however many of each."""
        return np.mean([one.total / one.tokens for one in (self.visual, self.text) if one.tokens], axis=0)


def moments(folder: Path, questions: Sequence[Question], tokens: int) -> dict[str, Iterator[Moments]]:
    """Return what the inputs of float32 matrices are, by graph of the exported model in `folder`.

    The vision tower, if there is one, looks at the questions' media, and the decoder reads the questions with the
    model's answers of at most `tokens` tokens. An encoder reads the questions alone.
    """
    model = open_exported(folder)
    read = [model.read(question, tokens) for question in questions]
    name = ENCODER if model.layout.encoder else DECODER
    found = {name: _moments(folder / name, read)}
    if model.layout.pictures:
        looked = [(inputs, None) for question in questions for inputs in model.look(question)]
        found[VISION] = _moments(folder / VISION, looked)
    return found


def _moments(path: Path, given: Sequence[tuple[dict[str, np.ndarray], np.ndarray | None]]) -> Iterator[Moments]:
    """Yield what each input of a graph's matrices is.

    `given` are inputs of the graph, and where visual tokens are among its tokens; None: all are. The graph runs again
    for each part of it whose moments fit the memory for them (`parts`).
    """
    graph = onnx.load(path, load_external_data=False)
    sizes = {one.name: one.dims for one in graph.graph.initializer}
    by_input: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        if node.op_type == "MatMul" and node.input[1] in sizes:
            by_input.setdefault(node.input[0], []).append(node)
    rows = {name: sizes[nodes[0].input[1]][0] for name, nodes in by_input.items()}
    graph.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in by_input)

    # Beside its weights, where the engine looks for them.
    with NamedTemporaryFile(dir=path.parent, suffix=".onnx") as file:
        onnx.save(graph, file.name)
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
    for names in parts(rows):
        found = {
            name: Moments(by_input[name], *(Moment(np.zeros((rows[name],) * 2, np.float32)) for _ in range(2)))
            for name in names
        }
        for inputs, visual in progress(given, desc=f"calibration: {path.stem}", unit="inputs", total=len(given)):
            for name, values in zip(names, session.run(names, inputs), strict=True):
                by_token = values.reshape(-1, values.shape[-1])
                # The decoder's head is given the last token alone.
                seen = np.ones(len(by_token), bool) if visual is None else visual[-len(by_token) :]
                found[name].visual.add(by_token[seen])
                found[name].text.add(by_token[~seen])
        yield from found.values()

"""Open the graphs of an exported folder in an engine: onnxruntime, on the CPU or by CUDA or TensorRT, or OpenVINO."""

import mmap
import platform
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from firstsight.core.cores import cores
from firstsight.core.engines import check_installed
from firstsight.core.errors import UserError
from firstsight.engine.layout import DECODER, ENCODER

# onnxruntime's execution providers by engine: the first is what is asked for, the others compute what it does not know.
_CPU, _CUDA, _TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
_PROVIDERS = {
    "onnxruntime": [_CPU],
    "onnxruntime-cuda": [_CUDA, _CPU],
    "onnxruntime-tensorrt": [_TENSORRT, _CUDA, _CPU],
}
# Of onnxruntime: whether threads wait actively for more work.
_SPINNING = "session.intra_op.allow_spinning"
_ON_CUDA = 'pip install "onnxruntime-gpu[cuda,cudnn]" in place of onnxruntime, or take the engine onnxruntime'


class Graph(ABC):
    """Run one graph: `inputs` are the names of what it takes."""

    inputs: list[str]

    @abstractmethod
    def run(self, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the graph's outputs, which the caller may change, in their order."""


class Runtime(ABC):
    """Open graphs in an engine: `name` has its version, `device` what it computes on, `threads` how many it uses."""

    name: str
    device: str
    # What may help where a graph cannot be opened.
    remedy = "copy the folder again, or export it again (dvc repro)"

    def __init__(self) -> None:
        self.threads = cores()
        self.device = f"{platform.machine()} CPU, {self.threads} threads"

    def open(self, path: Path) -> Graph:
        """Open a graph with its weights. Raises UserError where the engine cannot, or does not run it as asked."""
        try:
            return self._opened(path)
        except Exception as error:  # the engines raise nothing more specific over a damaged file
            raise UserError(
                f"{path}: expected a graph that {self.name.split()[0]} runs, found "
                f"{' '.join(str(error).split())[:200]}; {self.remedy}"
            ) from None

    @abstractmethod
    def _opened(self, path: Path) -> Graph: ...


def runtime(engine: str) -> Runtime:
    """Return an engine, one of `params.Engine`. Raises UserError where it, or its provider, is not installed."""
    check_installed(engine)
    return _OpenVino() if engine == "openvino" else _OnnxRuntime(_PROVIDERS[engine])


class _OnnxRuntime(Runtime):
    def __init__(self, providers: list[str]):
        import onnxruntime

        super().__init__()
        self._module, self._providers = onnxruntime, providers
        self.name = f"onnxruntime {onnxruntime.__version__}"
        if providers[0] == _CPU:
            return
        self.name += f", {providers[0]}"
        self.device = "GPU"
        if providers[0] not in (available := onnxruntime.get_available_providers()):
            raise UserError(f"onnxruntime: expected one with {providers[0]}, found {', '.join(available)}; {_ON_CUDA}")
        self.remedy = f"see that there is a GPU (nvidia-smi), and {_ON_CUDA}"
        # CUDA's libraries come from packages of pip as well.
        onnxruntime.preload_dlls()

    def _opened(self, path: Path) -> Graph:
        options = self._module.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3  # errors alone
        if path.name not in (DECODER, ENCODER):
            # Threads that wait actively for their graph's next run would take the cores from the decoder's.
            options.add_session_config_entry(_SPINNING, "0")
        with ExitStack() as opened:
            if (weights := _weights(path)).is_symlink():
                # As DVC makes it where its cache is on another disk. The engine refuses to follow it out of the folder,
                # but takes the content.
                file = opened.enter_context(weights.open("rb"))
                content = opened.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                options.add_external_initializers_from_files_in_memory([weights.name], [content], [len(content)])
            # By itself it goes on with the next provider where one fails, and says so in its log at most.
            session = self._module.InferenceSession(
                str(path), options, providers=self._providers, enable_fallback=False
            )
        if (found := session.get_providers()[0]) != self._providers[0]:
            raise RuntimeError(f"that {self._providers[0]} did not start, and {found} would in its place")
        return _Session(session)


class _Session(Graph):
    def __init__(self, session: Any):
        self.session = session
        self.inputs = [one.name for one in session.get_inputs()]

    def run(self, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, dict(given))


class _OpenVino(Runtime):
    def __init__(self) -> None:
        import openvino

        super().__init__()
        self._core = openvino.Core()
        # Without "-" and what build it is.
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        self._options = {
            # By default, 16 bits where the processor has units for them.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
        }

    def _opened(self, path: Path) -> Graph:
        with TemporaryDirectory() as temporary:
            if _weights(path).is_symlink():
                # As above; this engine takes files alone.
                for file in (path, _weights(path)):
                    shutil.copy(file, temporary)
                path = Path(temporary) / path.name
            model = self._core.read_model(path)
            if path.name == DECODER:
                _repeat_heads(model)
            return _Compiled(self._core.compile_model(model, "CPU", self._options))


class _Compiled(Graph):
    def __init__(self, model: Any):
        self._model = model
        self.inputs = [one.get_any_name() for one in model.inputs]

    def run(self, given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return list(self._model(dict(given)).values())


def _repeat_heads(model: Any) -> None:
    """Give each query's head the key's and value's head of its group, in all attention of an OpenVINO model.

    OpenVINO does so itself only where the number of queries' heads is written in the graph; here it follows from the
    width of a matrix, and OpenVINO takes it for the number of keys' heads.
    """
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() != "ScaledDotProductAttention":
            continue
        query_heads = ops.gather(ops.shape_of(node.input_value(0)), np.int64(1), np.int64(0))
        for place in (1, 2):
            shared = node.input_value(place)
            heads = np.int64(shared.get_partial_shape()[1].get_length())
            each = ops.range(np.int64(0), query_heads, np.int64(1), "i64")
            repeated = ops.gather(shared, ops.divide(ops.multiply(each, heads), query_heads), np.int64(1))
            node.input(place).replace_source_output(repeated.output(0))
    model.validate_nodes_and_infer_types()


def _weights(path: Path) -> Path:
    """Return the file with a graph's weights."""
    return path.with_name(f"{path.name}.data")

"""Check that the package of an engine, which runs exported models, is installed."""

from importlib.util import find_spec

from firstsight.core.errors import UserError

_OPENVINO = "openvino"


def check_installed(engine: str) -> None:
    """Raise UserError unless the package that has `engine`, one of `params.Engine`, is installed."""
    package = engine if engine == _OPENVINO else "onnxruntime"
    if find_spec(package) is not None:
        return
    if package == _OPENVINO:
        remedy = "pip install openvino, or take another engine (--engine, or evaluate.engine in params.yaml)"
    else:
        remedy = (
            "pip install -r requirements-device.txt, or ask a folder that PyTorch loads, such as "
            "models/student-distilled"
        )
    raise UserError(f"{package}: expected the engine that runs exported models, found it missing; {remedy}")

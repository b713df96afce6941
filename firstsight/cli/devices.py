"""The device on which commands run models."""

from collections.abc import Sequence
from pathlib import Path

from firstsight.cli import quiet
from firstsight.core.errors import UserError
from firstsight.engine.layout import is_exported


def device_of(folders: Sequence[Path], wanted: str) -> str:
    """Return the device, by `runtime.device`, of the models in `folders` that PyTorch runs, and silence transformers.

    Exported models run on the CPU; if there are no others, neither torch nor transformers is imported.

    Raises:
        UserError: there are others, and PyTorch is not installed.
    """
    others = [folder for folder in folders if not is_exported(folder)]
    if not others:
        return "cpu"
    try:
        from firstsight.models.device import pick_device
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name}: expected what runs {others[0]}, found it missing; pip install -r requirements.txt, or name "
            "an exported model, such as models/student-onnx"
        ) from None
    quiet.quiet_transformers()
    return pick_device(wanted)

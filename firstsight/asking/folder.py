"""Check the model folders that a user names."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.params import Data
from firstsight.core.variants import LEFT_OUT
from firstsight.engine.layout import is_exported, read_layout

# As in firstsight.acquisition.checks, which imports torch.
_CONFIG = "config.json"


def check_there(folder: Path) -> None:
    """Raise UserError unless `folder` holds a model; only loading it shows whether it is complete."""
    if (note := folder / LEFT_OUT).is_file():
        raise UserError(
            f"{folder}: expected a model, found it left out ({read_json(note, 'quantize-student')}); "
            "ask for it in params.yaml, and dvc repro makes it"
        )
    if not (folder / _CONFIG).is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: expected a model folder, found {found}; name one, such as models/student-distilled, "
            "which dvc repro makes"
        )


def template_of(folder: Path, data: Data) -> str | None:
    """Return the prompt template by which the model in `folder` is asked: its export's own, or that of params.yaml."""
    return read_layout(folder).prompt if is_exported(folder) else data.prompt

"""Check the model folders that a user names."""

from pathlib import Path

from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.params import Data
from firstsight.core.variants import LEFT_OUT
from firstsight.engine.layout import LAYOUT, is_exported, read_layout

# As in firstsight.acquisition.checks, which imports torch.
CONFIG, _CLASSIFIER = "config.json", "ForSequenceClassification"


def check_there(folder: Path) -> None:
    """Raise UserError unless `folder` holds a model; only loading it shows whether it is complete."""
    if (note := folder / LEFT_OUT).is_file():
        raise UserError(
            f"{folder}: expected a model, found it left out ({read_json(note, 'quantize-student')}); "
            "ask for it in params.yaml, and dvc repro makes it"
        )
    if any(folder.glob("*.onnx")) and not is_exported(folder):
        raise UserError(
            f"{folder}: expected {LAYOUT} beside the graphs of an exported model, found none; copy the folder again, "
            "or export it again (dvc repro)"
        )
    if is_exported(folder):
        stored, found = read_layout(folder).weights_bytes, sum(one.stat().st_size for one in folder.glob("*.onnx.data"))
        if found != stored:
            raise UserError(
                f"{folder}: expected {stored:,} bytes of weights (*.onnx.data), as {LAYOUT} says, found {found:,}; the "
                "copy is not complete, or of several exports: copy the folder again, or export it again (dvc repro)"
            )
    if not (folder / CONFIG).is_file():
        found = "a folder without config.json" if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: expected a model folder, found {found}; name one, such as models/student-distilled, "
            "which dvc repro makes"
        )


def template_of(folder: Path, data: Data) -> str | None:
    """Return the prompt template by which the model in `folder` is asked: its export's own, or that of params.yaml."""
    return read_layout(folder).prompt if is_exported(folder) else data.prompt


def classes_of(folder: Path, data: Data) -> list[str]:
    """Return the classes that the model in `folder`, which is not exported, tells apart; empty if it answers in text.

    An encoder names them itself; a language model scores those of params.yaml.
    """
    config = read_json(folder / CONFIG, "the stage that makes the model")
    names = config.get("id2label")
    if names and any(name.endswith(_CLASSIFIER) for name in config.get("architectures") or ()):
        return [names[number] for number in sorted(names, key=int)]
    return data.classes or []


def reads_text_alone(folder: Path) -> bool:
    """Return whether the model in `folder` takes no images and videos."""
    if is_exported(folder):
        return read_layout(folder).pictures is None
    return "vision_config" not in read_json(folder / CONFIG, "the stage that makes the model")

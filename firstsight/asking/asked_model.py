"""Load a model once, then answer one question at a time and measure how long each answer takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstsight.asking.folder import CONFIG, check_there
from firstsight.core.errors import UserError
from firstsight.core.files import read_json
from firstsight.core.params import Evaluate
from firstsight.engine.class_scores import open_exported
from firstsight.engine.layout import is_exported
from firstsight.records.sample import Sample


@dataclass(frozen=True)
class Answer:
    """Hold a model's answer, and the seconds from decoded frames and text to the last token."""

    text: str
    seconds: float

    def line(self) -> str:
        """Return the text as one line for a table, or "(nothing)" if it is empty."""
        return " ".join(self.text.split()) or "(nothing)"


class AskedModel:
    """Load a model, exported or not, to answer questions; `load_seconds` is the time that loading took.

    An exported model needs neither torch nor transformers, which are not imported for it, and runs in `engine`, one of
    `params.Engine`; None: in that of the settings. One that is not exported scores `classes`, or answers in text if
    there are none.

    Raises:
        UserError: the folder holds no model, or an encoder that was not taught these classes, or as for
            `ExportedModel`, or `load_processor` and `load_model`.
    """

    def __init__(
        self, folder: Path, settings: Evaluate, device: str, engine: str | None = None, classes: Sequence[str] = ()
    ):
        check_there(folder)
        self.folder, self._settings = folder, settings
        started = time.perf_counter()
        if is_exported(folder):
            self._model = open_exported(folder, engine or settings.engine)
        else:
            self._model = _in_pytorch(folder, settings.precision, device, classes)
        self.load_seconds = time.perf_counter() - started

    def answer(self, sample: Sample) -> Answer:
        """Answer the sample's question, or name its class with the probability of that.

        Raises UserError if the model has too few positions for it.
        """
        started = time.perf_counter()
        question = (sample, sample.records[0])
        if hasattr(self._model, "classify"):
            ((name, share),) = self._model.classify([question])
            return Answer(f"{name} ({share:.2f})", time.perf_counter() - started)
        (text,) = self._model.answers([question], 1, self._settings.asked_tokens())
        return Answer(text, time.perf_counter() - started)


def _in_pytorch(folder: Path, precision: str, device: str, classes: Sequence[str]) -> Any:
    # Imported here, because exported models are asked where torch and transformers are not installed.
    from firstsight.generation import pytorch_model
    from firstsight.models.architecture import is_encoder
    from firstsight.models.heads import has_head
    from firstsight.models.loading import load_model
    from firstsight.models.processors import load_processor
    from firstsight.packing.forward import as_sums

    kind = read_json(folder / CONFIG, "the stage that makes the model").get("model_type")
    if is_encoder(kind) and not has_head(folder, classes):  # loading it would draw a head at random
        raise UserError(
            f"{folder}: expected an encoder that was taught classes, found one without a head for them; ask one that "
            "was trained, such as models/student-distilled"
        )
    processor = load_processor(folder)
    model = load_model(folder, precision, device, classes=classes)
    if classes:
        return pytorch_model.ClassModel(model, processor, precision, classes, as_sums)
    return pytorch_model.PyTorchModel(model, processor, precision)

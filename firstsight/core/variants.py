"""The variants of teacher and student that are all measured in the same way and reported next to each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from firstsight.core.files import read_json, whole_folder, write_json
from firstsight.core.params import Method
from firstsight.core.processes import is_main_process
from firstsight.core.stage import log


@dataclass(frozen=True)
class Variant:
    """Name a model folder and how it is quantized on loading; with None, it is loaded as `evaluate.precision` says."""

    model: Path
    quantized_on_loading: str | None = None


# To add a quantization method, extend `Method` in params.py, from which all of this follows; CONTRIBUTING.md names the
# other places.
METHODS: tuple[str, ...] = get_args(Method)
# The formats of exports, and the precision of their weights.
FORMATS = {"onnx": "float32", "onnx-int8": "int8", "onnx-w4a8": "w4a8"}
TEACHER = "teacher"
# The teacher in the engine of the exported students.
EXPORTED_TEACHER = "teacher-onnx"
DISTILLED = "student-distilled"
# The student trained without a teacher, to which the distilled one is compared.
CONTROL = "student-finetuned"
EXPORTED = tuple(f"student-{name}" for name in FORMATS)
# The distilled students that the pipeline makes, each a folder of models/, which can be published.
STUDENTS = (DISTILLED, *(f"student-{method}" for method in METHODS), *EXPORTED)
_TEACHER = Path("models/teacher-finetuned")
VARIANTS = {
    TEACHER: Variant(_TEACHER),
    **{f"teacher-{method}": Variant(_TEACHER, method) for method in METHODS},
    EXPORTED_TEACHER: Variant(Path("models") / EXPORTED_TEACHER),
    "student": Variant(Path("models/student")),
    CONTROL: Variant(Path("models") / CONTROL),
    **{student: Variant(Path("models") / student) for student in STUDENTS},
}
# The only file of a variant's folders where params.yaml does not ask for it: DVC requires every output to exist.
LEFT_OUT = "left-out.json"
# The file of the control's folder that holds its fingerprint where it was trained without a teacher, otherwise null.
TRAINED_ALONE = "trained-alone.json"
# Why the stages of the teacher, and distill, are left out where there is none.
NO_TEACHER = "models.teacher is null"


def reason_left_out(folder: Path) -> str | None:
    """Return why params.yaml leaves out what would be in `folder`, or None if it does not.

    Raises UserError when the note that says so is broken.
    """
    note = folder / LEFT_OUT
    return read_json(note, "the stage that makes it") if note.exists() else None


def leave_out(output: Path, reason: str, beside: Mapping[str, Any] | None = None) -> None:
    """Write the note that says why params.yaml leaves `output` out, as the folder's only file but those named `beside`.

    These are JSON files that other stages read from the folder. Of several processes, the main one writes.
    """
    if is_main_process():
        with whole_folder(output) as folder:
            for name, value in {LEFT_OUT: reason, **(beside or {})}.items():
                write_json(folder / name, value)
    log.info("%s is left out: %s", output, reason)

"""The variants that are measured by one protocol and shown side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from firstsight.core.params import Method


@dataclass(frozen=True)
class Variant:
    """A model folder, and the method by which it is quantized on loading; with None, `evaluate.precision` decides."""

    model: Path
    quantized_on_loading: str | None = None


# To add a quantization method, extend `Method` and `MODEL_OUTPUTS` in params.py, both `foreach` in dvc.yaml, and
# `quantization_config`, `stored_method`, `check_quantized` in models/loading.py; its bytes: planning/gpu_memory.py.
METHODS: tuple[str, ...] = get_args(Method)
TEACHER = "teacher"
DISTILLED = "student-distilled"
# The students that the pipeline makes, each a folder of models/, which can be published.
STUDENTS = (DISTILLED, *(f"student-{method}" for method in METHODS))
_TEACHER = Path("models/teacher-finetuned")
VARIANTS = {
    TEACHER: Variant(_TEACHER),
    **{f"teacher-{method}": Variant(_TEACHER, method) for method in METHODS},
    "student": Variant(Path("models/student")),
    **{student: Variant(Path("models") / student) for student in STUDENTS},
}
# In the place of the model, and of its figures, of a variant that params.yaml does not ask for. DVC wants every output.
LEFT_OUT = "left-out.json"

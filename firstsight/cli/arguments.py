"""Arguments that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from firstsight.core.errors import UserError
from firstsight.core.params import Engine
from firstsight.core.variants import CONTROL, STUDENTS

TRAINED = (*STUDENTS, CONTROL)
Student = Annotated[str, typer.Argument(metavar="VARIANT", help=f"One of {', '.join(TRAINED)}.")]
EngineOption = Annotated[
    Engine | None,
    typer.Option(
        metavar="ENGINE",
        help=f"What runs exported models: {', '.join(get_args(Engine))}; otherwise as evaluate.engine says.",
    ),
]


def check_student(variant: str) -> None:
    """Raise UserError unless the variant is a student that the pipeline makes."""
    if variant not in TRAINED:
        raise UserError(f"{variant}: expected a student, one of {', '.join(TRAINED)}; correct VARIANT")


def check_engine(engine: str | None, folders: Sequence[Path]) -> None:
    """Raise UserError unless one of the folders is exported, for `engine` to run, and the engine can be started."""
    from firstsight.engine.layout import is_exported
    from firstsight.engine.runtimes import runtime

    if engine is None:
        return
    if not any(map(is_exported, folders)):
        raise UserError(
            f"--engine: expected an exported model, such as models/student-onnx, for {engine} to run, found none; "
            "leave it out"
        )
    runtime(engine)

"""Arguments that several commands share."""

from typing import Annotated

import typer

from firstsight.core.errors import UserError
from firstsight.core.variants import CONTROL, STUDENTS

TRAINED = (*STUDENTS, CONTROL)
Student = Annotated[str, typer.Argument(metavar="VARIANT", help=f"One of {', '.join(TRAINED)}.")]


def check_student(variant: str) -> None:
    """Raise UserError unless the variant is a student that the pipeline makes."""
    if variant not in TRAINED:
        raise UserError(f"{variant}: expected a student, one of {', '.join(TRAINED)}; correct VARIANT")

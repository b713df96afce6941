"""firstsight repro: the pipeline, with stages side by side where that is faster."""

import shutil
import sys
from typing import Annotated

import typer


def repro(
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Stages at a time. Default: 1 with a GPU, which each stage uses whole; otherwise 2."),
    ] = None,
) -> None:
    """Run what is out of date, as dvc repro does, with stages side by side that do not depend on each other.

    What measures time runs alone. Two stages take the memory of both.
    """
    from firstsight.core import params
    from firstsight.core.cores import cores
    from firstsight.running import side_by_side

    if jobs is None:
        gpu = params.load().runtime.device != "cpu" and shutil.which("nvidia-smi")
        jobs = 1 if gpu else min(2, cores())
    if status := side_by_side.repro(jobs):
        sys.exit(status)

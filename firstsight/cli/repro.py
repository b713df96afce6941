"""firstsight repro: the pipeline, with stages side by side where that is faster."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

# What drivers of GPUs have there: NVIDIA's, AMD's, and that of Windows' Linux.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def repro(
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Stages at a time. Default: 1 with a GPU, which each stage uses whole; otherwise 2."),
    ] = None,
) -> None:
    """Run what is out of date, like dvc repro, but side by side.

    That holds for stages that do not depend on each other; what measures time runs alone. Two stages take the memory of
    both.
    """
    from firstsight.core import params
    from firstsight.core.cores import cores
    from firstsight.running import side_by_side

    if jobs is None:
        jobs = 1 if _uses_gpu(params.load().runtime.device) else min(2, cores())
    side_by_side.repro(jobs)


def _uses_gpu(device: str) -> bool:
    """Return whether stages may run on a GPU; asking torch would take seconds."""
    there = shutil.which("nvidia-smi") is not None or any(Path(driver).exists() for driver in _DRIVERS)
    return device == "cuda" or (device == "auto" and there)

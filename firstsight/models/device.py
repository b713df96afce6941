"""Decide on which device, and in which precision, models compute: here and nowhere else."""

import torch
from accelerate import PartialState

from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.processes import processes_here
from firstsight.core.stage import log

# The precision in which each method of training loads a model: float32 for weights that are trained themselves.
TRAINING_PRECISIONS = {"full": "float32", "lora": "auto", "adalora": "auto", "qlora": "nf4"}


def pick_device(wanted: str) -> str:
    """Return "cuda" or "cpu" for `runtime.device`, and log it; "auto" is CUDA where available.

    With several processes, each gets a GPU of its own as its "cuda", or its share of the CPU's threads.

    Raises:
        UserError: "cuda" is wanted and not available.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("runtime.device: expected a CUDA device, found none; set it to auto or cpu")
    device = "cuda" if available and wanted != "cpu" else "cpu"
    state = PartialState(cpu=device == "cpu")
    if device == "cuda":
        place = torch.cuda.get_device_name(state.device)
    else:
        # `accelerate launch` leaves each process one thread; divide all that those on this machine may use.
        torch.set_num_threads(max(1, cores() // processes_here()))
        place = f"the CPU, {torch.get_num_threads()} threads"
    log.info("running on %s%s", place, f", in {state.num_processes} processes" if state.num_processes > 1 else "")
    if device == "cuda" and not has_bfloat16(device):
        log.info("it computes no bfloat16: precision auto is float16, and training computes in float32")
    return device


def has_bfloat16(device: str) -> bool:
    """Return whether the device computes in bfloat16: NVIDIA's GPUs do from compute capability 8.0 (Ampere)."""
    return device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)


def auto_dtype(device: str) -> torch.dtype:
    """Return what the precision "auto" means on a device, for weights that are not quantized."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16


def training_precision(method: str, device: str) -> str:
    """Return the precision in which a method of training loads a model on the device.

    Without bfloat16 it is float32 for adapters too: gradients of float16 would be rounded to zero.

    Raises:
        UserError: `method` is qlora on a GPU without bfloat16.
    """
    if device == "cuda" and not has_bfloat16(device):
        if method == "qlora":
            raise UserError(
                f"method: expected full, lora or adalora on {torch.cuda.get_device_name()}, which computes no "
                "bfloat16, found qlora; set method to lora"
            )
        return "float32"
    return TRAINING_PRECISIONS[method]

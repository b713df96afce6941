"""How large and how fast: measured on the spot, at batch 1, warmed up and with the device synchronised."""

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from firstsight.evaluation.answering import Question, generate, model_inputs

_WARM_UP = 2


def weights_bytes(model: PreTrainedModel) -> int:
    """Bytes of the model's parameters and buffers in memory, quantised ones with their scales; tied ones once."""
    return model.get_memory_footprint()


def parameter_count(model: PreTrainedModel) -> int:
    """Parameters by their number, also where 4-bit storage packs two in a byte."""
    return model.num_parameters()


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure_speed(
    model: PreTrainedModel, processor: Any, questions: Sequence[Question], runs: int, new_tokens: int
) -> dict[str, float]:
    """Latency of answering one question with exactly `new_tokens` tokens, media processing apart.

    Returns milliseconds: `latency_ms_p50`, `latency_ms_p90` of the whole answer, `prefill_ms_p50` up to the first
    token; and `decode_tokens_per_second` after it.
    """
    batches = [model_inputs(processor, [questions[number % len(questions)]], model.device) for number in range(runs)]

    def timed(tokens: int) -> np.ndarray:
        for inputs in batches[:_WARM_UP]:
            generate(model, inputs, max_new_tokens=tokens, min_new_tokens=tokens)
        return np.array(
            [
                _milliseconds(lambda i=inputs: generate(model, i, max_new_tokens=tokens, min_new_tokens=tokens))
                for inputs in batches
            ]
        )

    prefill, whole = timed(1), timed(new_tokens)
    speed = {
        "latency_ms_p50": float(np.median(whole)),
        "latency_ms_p90": float(np.quantile(whole, 0.9)),
        "prefill_ms_p50": float(np.median(prefill)),
    }
    if new_tokens > 1:
        decode_ms = np.median(whole) - np.median(prefill)
        speed["decode_tokens_per_second"] = float(1000 * (new_tokens - 1) / max(decode_ms, 1e-3))
    return speed


def _milliseconds(work: Callable[[], Any]) -> float:
    _synchronise()
    start = time.perf_counter()
    work()
    _synchronise()
    return 1000 * (time.perf_counter() - start)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, str]:
    """What the figures were measured on: device, its name, and the versions that matter."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}

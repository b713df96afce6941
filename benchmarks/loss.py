"""Measure time and memory of the distillation loss, forward and backward, against other implementations.

    python -m benchmarks.loss              on CUDA if available, else on the CPU

Shapes are those of Qwen2-VL-7B as teacher of Qwen2-VL-2B: heads [151936, 1536] and [152064, 3584], over increasing
numbers of answer tokens; float32 on the CPU, bfloat16 on CUDA. `plain` is the same loss in PyTorch with full logits;
Liger's two (if liger-kernel is installed) are its nearest: JSD over logits of the same height, without T^2.

Each case runs in its own process, so that peaks do not mix. Memory is the peak above inputs, parameters and their
gradients: torch's allocations on CUDA, resident memory on the CPU. Time is the median of several passes after the
first. Writes benchmarks/loss-cpu.csv or benchmarks/loss-cuda.csv, with the ratios to plain PyTorch in the same run.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from benchmarks.measuring import alone, environment, write
from firstsight.core.stage import log, main
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.teachers import HiddenTeacher
from firstsight.profiling.peak_memory import PeakMemory

STUDENT, TEACHER = (151_936, 1536), (152_064, 3584)
SHARED, TEMPERATURE, ALPHA = 151_657, 2.0, 0.7
TOKENS = {"cpu": (128, 1024), "cuda": (1024, 4096, 8192)}
REPEATS = {"cpu": 2, "cuda": 10}


def ours(hidden: Tensor, head: Tensor, answers: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return FirstSight's loss."""
    return distillation_loss(
        hidden,
        head,
        answers,
        HiddenTeacher(teacher_hidden, teacher_head),
        shared_vocabulary=SHARED,
        temperature=TEMPERATURE,
        alpha=ALPHA,
    ).total


def plain(hidden: Tensor, head: Tensor, answers: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return the same loss from full logits, differentiated by autograd."""
    logits, teacher = linear(hidden, head).float(), linear(teacher_hidden, teacher_head).float()
    soft = kl_div(
        (logits[:, :SHARED] / TEMPERATURE).log_softmax(-1),
        (teacher[:, :SHARED] / TEMPERATURE).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * cross_entropy(logits, answers, reduction="sum")


def chunked(hidden: Tensor, head: Tensor, answers: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1 - ALPHA, ALPHA, temperature=TEMPERATURE, compiled=hidden.is_cuda)
    return loss(hidden, head, teacher_hidden, teacher_head[: len(head)], answers)


def fused(hidden: Tensor, head: Tensor, answers: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return Liger's fused loss: Triton, CUDA only, without the cross-entropy."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(temperature=TEMPERATURE)
    return loss(hidden, head, teacher_hidden, teacher_head[: len(head)], answers)


def implementations(device: str) -> dict[str, Callable[..., Tensor]]:
    """Return the implementations available here by name, the baseline (plain PyTorch) first."""
    liger = {"Liger, chunked": chunked} if find_spec("liger_kernel") else {}
    if liger and device == "cuda":
        liger["Liger, fused"] = fused
    return {"plain PyTorch": plain, **liger, "FirstSight": ours}


def measure(name: str, tokens: int, device: str) -> dict[str, float]:
    """Return the median seconds and peak bytes of a forward and backward pass, and the summed loss for comparison."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    hidden, head = normal(tokens, STUDENT[1], 1), normal(*STUDENT, 3 / STUDENT[1] ** 0.5)
    teacher_hidden, teacher_head = normal(tokens, TEACHER[1], 1), normal(*TEACHER, 3 / TEACHER[1] ** 0.5)
    answers = torch.randint(SHARED, (tokens,), device=device)
    hidden.requires_grad_()
    head.requires_grad_()
    compute = implementations(device)[name]

    def step() -> float:
        loss = compute(hidden, head, answers, teacher_hidden, teacher_head)
        loss.backward()
        hidden.grad = head.grad = None
        return loss.item()  # waits for the device

    memory = PeakMemory(device)
    total = step()
    peak = memory.peak()
    seconds = []
    for _ in range(REPEATS[device]):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    gradients = hidden.nbytes + head.nbytes
    return {"seconds": statistics.median(seconds), "bytes": peak - gradients, "loss": total}


def run() -> None:
    if len(sys.argv) == 4:
        name, tokens, device = sys.argv[1:]
        print(json.dumps(measure(name, int(tokens), device)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for tokens in TOKENS[device]:
        found = {}
        for name in implementations(device):
            found[name] = alone("loss", name, str(tokens), device)
            reference = found["plain PyTorch"]
            rows.append({
                "implementation": name,
                "answer_tokens": tokens,
                "seconds": round(found[name]["seconds"], 4),
                "memory_mb": round(found[name]["bytes"] / 1e6),
                "time_ratio": round(found[name]["seconds"] / reference["seconds"], 3),
                "memory_ratio": round(found[name]["bytes"] / reference["bytes"], 3),
                "loss": f"{found[name]['loss']:.7g}",
                **environment(device),
            })  # fmt: skip
            log.info("%(implementation)s, %(answer_tokens)d tokens: %(seconds).2f s, %(memory_mb)d MB", rows[-1])
    write(f"loss-{device}", rows)


if __name__ == "__main__":
    main(run)

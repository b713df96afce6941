"""Measure time, memory and error of the distillation loss, forward and backward, against other implementations.

    python -m benchmarks.loss              on CUDA if available, else on the CPU

Shapes are those of Qwen2-VL-7B as teacher of Qwen2-VL-2B: heads [151936, 1536] and [152064, 3584], of which 151,657
tokens are shared, over increasing numbers of answer tokens; float32 on the CPU, bfloat16 on CUDA (float16 where a GPU
has none). `FirstSight` is the loss as it is trained with, on CUDA by its Triton kernel; `FirstSight, PyTorch` the same
on CUDA without the kernel; `plain PyTorch` the same from full logits. Liger's two, if liger-kernel is installed, are
its nearest: the JSD over logits of the same height, chunked with the cross-entropy, or fused without it.

Each implementation runs in its own process. Time is the median of several passes after the first ones, each waited for.
Memory is the peak of these above inputs, parameters and their gradients: torch's allocations on CUDA, resident memory
on the CPU. Errors are those of the gradients for hidden states and head against the same objective in float64:
|found - exact| / |exact|. Writes benchmarks/loss-cpu.csv or benchmarks/loss-cuda.csv after each case, with the ratios
to plain PyTorch in the same run. Cases that fail, such as full logits that do not fit, are named and left out.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear

from benchmarks.measuring import environment, lines, write
from firstsight.core.stage import log, main
from firstsight.loss.distillation_loss import distillation_loss
from firstsight.loss.divergences import FORWARD_KL, Divergence
from firstsight.loss.teachers import HiddenTeacher
from firstsight.profiling.peak_memory import PeakMemory

STUDENT, TEACHER = (151_936, 1536), (152_064, 3584)
SHARED, TEMPERATURE, ALPHA = 151_657, 2.0, 0.7
TOKENS = {"cpu": (128, 1024), "cuda": (64, 512, 4096, 8192)}
# Passes before those that are measured, in which kernels are compiled, and passes measured.
WARM_UP, REPEATS = {"cpu": 1, "cuda": 3}, {"cpu": 2, "cuda": 20}


@dataclass(frozen=True)
class Objective:
    """Say what an implementation differentiates.

    D runs over the shared tokens, or else over all of the student's. The sum over answer tokens may be a mean instead.
    """

    alpha: float = ALPHA
    divergence: Divergence = FORWARD_KL
    shared: bool = True
    mean: bool = False


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


def ours_without_triton(*tensors: Tensor) -> Tensor:
    """Return FirstSight's loss, computed as where Triton is missing."""
    with patch("firstsight.loss.distillation_loss._kernel", lambda device: None):
        return ours(*tensors)


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
    """Return Liger's chunked loss, with T^2."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(1 - ALPHA, ALPHA * TEMPERATURE**2, temperature=TEMPERATURE, compiled=hidden.is_cuda)
    return loss(hidden, head, teacher_hidden, teacher_head[: len(head)], answers)


def fused(hidden: Tensor, head: Tensor, answers: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
    """Return Liger's fused loss, with T^2: Triton, CUDA only, without the cross-entropy."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(temperature=TEMPERATURE)
    return TEMPERATURE**2 * loss(hidden, head, teacher_hidden, teacher_head[: len(head)], answers)


def implementations(device: str) -> dict[str, tuple[Callable[..., Tensor], Objective]]:
    """Return the implementations available here by name, the baseline (plain PyTorch) first, and their objectives."""
    found = {"plain PyTorch": (plain, Objective()), "FirstSight": (ours, Objective())}
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        found["FirstSight, PyTorch"] = ours_without_triton, Objective()
    if find_spec("liger_kernel"):
        jsd = Objective(divergence=Divergence("jsd", 0.5), shared=False, mean=True)
        found["Liger, chunked"] = chunked, jsd
        if device == "cuda":
            found["Liger, fused"] = fused, replace(jsd, alpha=1.0)
    return found


def inputs(tokens: int, device: str) -> tuple[Tensor, ...]:
    """Return hidden states and head of the student, which take gradients, answers, and those of the teacher."""
    torch.manual_seed(0)
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return (torch.randn(rows, columns, device=device) * scale).to(dtype)

    hidden, head = normal(tokens, STUDENT[1], 1), normal(*STUDENT, 3 / STUDENT[1] ** 0.5)
    teacher_hidden, teacher_head = normal(tokens, TEACHER[1], 1), normal(*TEACHER, 3 / TEACHER[1] ** 0.5)
    answers = torch.randint(SHARED, (tokens,), device=device)
    return hidden.requires_grad_(), head.requires_grad_(), answers, teacher_hidden, teacher_head


def exact_gradients(tensors: tuple[Tensor, ...], objective: Objective) -> tuple[Tensor, ...]:
    """Return the gradients of an objective for hidden states and head, in float64 without the kernel."""
    hidden, head, answers, teacher_hidden, teacher_head = tensors
    hidden, head = (one.detach().double().requires_grad_() for one in (hidden, head))
    total = distillation_loss(
        hidden,
        head,
        answers,
        HiddenTeacher(teacher_hidden.double(), teacher_head.double()),
        shared_vocabulary=SHARED if objective.shared else len(head),
        temperature=TEMPERATURE,
        alpha=objective.alpha,
        divergence=objective.divergence,
    ).total
    return torch.autograd.grad(total / len(answers) if objective.mean else total, (hidden, head))


def measure(name: str, tokens: int, device: str) -> dict[str, float]:
    """Return seconds and peak bytes of a forward and backward pass, the loss, and the errors of its gradients."""
    tensors = inputs(tokens, device)
    hidden, head = tensors[:2]
    compute, objective = implementations(device)[name]

    def step() -> float:
        hidden.grad = head.grad = None
        loss = compute(*tensors)
        loss.backward()
        return loss.item()  # waits for the device

    for _ in range(WARM_UP[device]):
        step()
    hidden.grad = head.grad = None
    memory = PeakMemory(device)
    seconds = []
    for _ in range(REPEATS[device]):
        started = time.perf_counter()
        total = step()
        seconds.append(time.perf_counter() - started)
    peak = memory.peak() - hidden.nbytes - head.nbytes
    errors = [
        ((one.grad.double() - exact).norm() / exact.norm()).item()
        for one, exact in zip((hidden, head), exact_gradients(tensors, objective), strict=True)
    ]
    return {
        "tokens": tokens,
        "seconds": statistics.median(seconds),
        "bytes": peak,
        "loss": total,
        "hidden_error": errors[0],
        "head_error": errors[1],
    }


def row(name: str, found: dict[str, float], reference: dict[str, float] | None, device: str) -> dict[str, Any]:
    """Return a row of the CSV file; without ratios if plain PyTorch was left out."""
    ratio = {key: found[key] / reference[key] for key in ("seconds", "bytes")} if reference else {}
    return {
        "implementation": name,
        "answer_tokens": found["tokens"],
        "seconds": round(found["seconds"], 6),
        "memory_mb": round(found["bytes"] / 1e6),
        "time_ratio": round(ratio["seconds"], 3) if ratio else None,
        "memory_ratio": round(ratio["bytes"], 3) if ratio else None,
        "loss": f"{found['loss']:.7g}",
        "hidden_error": f"{found['hidden_error']:.2g}",
        "head_error": f"{found['head_error']:.2g}",
        **environment(device),
    }


def run() -> None:
    if len(sys.argv) == 3:
        name, device = sys.argv[1:]
        for tokens in TOKENS[device]:
            print(json.dumps(measure(name, tokens, device)), flush=True)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, plain_cases = [], {}
    for name in implementations(device):
        try:
            for found in lines("loss", name, device):
                if name == "plain PyTorch":
                    plain_cases[found["tokens"]] = found
                rows.append(row(name, found, plain_cases.get(found["tokens"]), device))
                write(f"loss-{device}", rows)
                log.info("%(implementation)s, %(answer_tokens)d tokens: %(seconds).4f s, %(memory_mb)d MB", rows[-1])
        except subprocess.CalledProcessError as failure:
            done = [one["answer_tokens"] for one in rows if one["implementation"] == name]
            log.warning("%s: left out above %s tokens, because %s", name, max(done, default=0), failure)
    if not find_spec("liger_kernel"):
        log.warning("Liger: left out, because liger-kernel is not installed")


if __name__ == "__main__":
    main(run)

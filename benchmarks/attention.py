"""Measure the attention of a layer of Qwen2-VL-2B with a mask of all tokens, and with one of those that need it.

    python -m benchmarks.attention [DIVISOR]      default: 1; with 8, there is an eighth of its heads

Queries, keys and values of packed sequences of several lengths (a picture of 448 x 448 in each of four, videos of 16 to
64 frames in one), with one question and with eight, go forward and backward through attention, with both masks in
turns. They are random; bfloat16 on CUDA, float32 on the CPU. `masked_tokens` is how many tokens the mask has rows for,
`memory_mb` (CUDA alone) what the pass takes at most, the mask included, and `difference` how far the queries' gradient
is from that with a mask of all tokens, as a share of its norm. Writes benchmarks/attention-cpu.csv or
benchmarks/attention-cuda.csv.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.measuring import environment, write
from firstsight.core.stage import log, main
from firstsight.models.device import pick_device
from firstsight.models.text_attention import NAME, attend_causally_first
from firstsight.packing.forward import attention_mask
from firstsight.packing.pack import PREFIX
from firstsight.planning.shapes import QWEN2_VL_2B

# Sequences, tokens of their prefix, and questions. 256 tokens for a picture or two frames of a video.
SHAPES = [(4, 280, 1), (4, 280, 8), (1, 2072, 1), (1, 2072, 8), (1, 4120, 8), (1, 8216, 1), (1, 8216, 8)]
QUESTION = 40
MASKS = {"all tokens": "sdpa", "where needed": NAME}
REPEATS = 5


def run() -> None:
    divisor = int(sys.argv[1]) if sys.argv[1:] else 1
    device = pick_device("auto")
    model = one_layer(divisor, device)
    rows: list[dict[str, Any]] = []
    for sequences, prefix, questions in SHAPES:
        numbers = [PREFIX] * prefix + [one + 1 for one in range(questions) for _ in range(QUESTION)]
        segments = torch.tensor([numbers] * sequences, device=device)
        found = compared(model, segments)
        whole = found["all tokens"]
        for mask, (seconds, memory, masked, gradient) in found.items():
            error = (gradient - whole[3]).float().norm() / whole[3].float().norm()
            rows.append({
                "mask": mask,
                "sequences": sequences,
                "tokens": len(numbers),
                "questions": questions,
                "masked_tokens": masked,
                "seconds": f"{seconds:.4g}",
                "time_ratio": round(seconds / whole[0], 3),
                "memory_mb": "" if memory is None else round(memory / 1e6),
                "difference": f"{float(error):.1e}",
                **environment(device),
            })  # fmt: skip
            log.info(
                "%(sequences)d of %(tokens)d tokens, %(questions)d questions, a mask of %(mask)s: %(seconds)s s",
                rows[-1],
            )
        write(f"attention-{device}", rows)


def one_layer(divisor: int, device: str) -> Qwen2ForCausalLM:
    """Return a language model with one layer, which has the attention of Qwen2-VL-2B, and little else."""
    names = ("num_attention_heads", "num_key_value_heads")
    heads = {name: max(1, QWEN2_VL_2B[name] // divisor) for name in names}
    width = QWEN2_VL_2B["hidden_size"] // QWEN2_VL_2B["num_attention_heads"] * heads["num_attention_heads"]
    config = Qwen2Config(**heads, hidden_size=width, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    attend_causally_first(model)
    return model


def compared(model: Any, segments: Tensor) -> dict[str, tuple[float, int | None, int, Tensor]]:
    """Return the seconds of a pass, its memory, the tokens with a mask, and queries' gradients, by the mask's kind."""
    attention, generator = model.model.layers[0].self_attn, torch.Generator().manual_seed(0)
    heads = (model.config.num_attention_heads, *[model.config.num_key_value_heads] * 2)
    given = [
        torch.randn(len(segments), count, segments.shape[1], attention.head_dim, generator=generator)
        .to(segments.device, model.dtype)
        .requires_grad_()
        for count in heads
    ]
    found: dict[str, list[tuple[float, int | None, int, Tensor]]] = {mask: [] for mask in MASKS}
    for _ in range(REPEATS + 1):
        for mask, implementation in MASKS.items():
            model.config._attn_implementation = implementation
            found[mask].append(passed(model, attention, given, segments))
    return {
        mask: (statistics.median(one[0] for one in passes[1:]), *passes[-1][1:])  # the first warms up
        for mask, passes in found.items()
    }


def passed(
    model: Any, attention: nn.Module, given: Sequence[Tensor], segments: Tensor
) -> tuple[float, int | None, int, Tensor]:
    """Make a mask, and pass queries, keys and values forward and backward through the attention."""
    attend, on_gpu = AttentionInterface()[model.config._attn_implementation], segments.is_cuda
    for one in given:
        one.grad = None
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    taken = torch.cuda.memory_allocated() if on_gpu else 0
    started = time.perf_counter()
    mask = attention_mask(model, segments)
    out, _ = attend(attention, *given, mask, dropout=0.0, scaling=attention.scaling)
    out.sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() - taken if on_gpu else None
    return seconds, memory, mask.shape[2], given[0].grad


if __name__ == "__main__":
    main(run)

"""Measure a model's size, latency and throughput, after a warm-up.

Decoding and preprocessing of images and videos are not part of the times.
"""

import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from firstsight.core.params import Evaluate
from firstsight.core.stage import log
from firstsight.engine.layout import GRAPH_FILES
from firstsight.profiling.peak_memory import PeakMemory
from firstsight.records.sample import Record, Sample

Question = tuple[Sample, Record]

# Bytes of what is copied to measure the memory's bandwidth: more than most caches hold.
_COPIED_BYTES = 1 << 27
# Repeats of each question: one disturbance does not move their median, and their spread says how reliable it is.
_REPEATS = 5


class Measured(Protocol):
    """A model whose speed is measured, in PyTorch or in another engine.

    `token_bytes` are those of the weights that are read for each token of an answer.
    """

    token_bytes: int

    def inputs(self, questions: Sequence[Question]) -> Any:
        """Return the model's inputs for a batch of questions, with decoded and prepared images and videos."""

    def generate(self, inputs: Any, tokens: int) -> Any:
        """Answer each question with exactly `tokens` tokens, and return when all are computed.

        Raises:
            MemoryError: the questions do not fit the device together.
        """

    def copying(self, size: int) -> Callable[[], Any]:
        """Return a function that copies `size` bytes within the device's memory, and returns when they are copied."""


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the weights on disk, with those of the graphs that an export has."""
    found = (folder.glob(pattern) for pattern in ("*.safetensors", *GRAPH_FILES))
    return sum(path.stat().st_size for path in chain.from_iterable(found))


def representative(questions: Sequence[Question], count: int) -> list[Question]:
    """Return `count` questions spread evenly over the split.

    The last is the question with the most frames, which determines peak memory.
    """
    spread = [questions[number * len(questions) // count] for number in range(count)]
    return [*spread[:-1], max(questions, key=lambda question: len(question[0].frames))]


def measure_latency(
    model: Measured, questions: Sequence[Question], settings: Evaluate, *, one_pass: bool = False
) -> dict[str, float]:
    """Time `settings.latency_runs` questions at batch 1, answered with exactly `settings.latency_new_tokens` tokens.

    Returns percentiles over the questions, each represented by the median of its repeats, in milliseconds:
    `latency_ms_p50` and `latency_ms_p90` of the whole answer, `prefill_ms_p50` up to the first token; further
    `token_ms` and its inverse `decode_tokens_per_second` after the first token, and `latency_spread`, the median over
    questions of the interquartile range of the repeats divided by their median. Where an answer is `one_pass`, whatever
    the number of tokens, the time of a token is that of the answer.
    """
    asked = representative(questions, settings.latency_runs)
    batches = [model.inputs([question]) for question in asked]
    lengths = (1, settings.latency_new_tokens)
    # Rounds over all questions, so that a temporary slowdown of the machine affects one repeat of each question. The
    # first round is the warm-up.
    rounds = [[[_timed(model, inputs, n) for inputs in batches] for n in lengths] for _ in range(1 + _REPEATS)]
    repeats = np.array(rounds[1:])
    prefill, whole = np.median(repeats, axis=0)
    low, high = np.quantile(repeats[:, 1], (0.25, 0.75), axis=0)
    after_first = max(np.median(whole - prefill), 1e-3) / (settings.latency_new_tokens - 1)
    token = np.median(whole) if one_pass else after_first
    return {
        "prefill_ms_p50": float(np.median(prefill)),
        "latency_ms_p50": float(np.median(whole)),
        "latency_ms_p90": float(np.quantile(whole, 0.9)),
        "latency_spread": float(np.median((high - low) / whole)),
        "token_ms": float(token),
        "decode_tokens_per_second": float(1000 / token),
    }


def measure_throughput(
    model: Measured, questions: Sequence[Question], settings: Evaluate, memory: PeakMemory
) -> dict[str, dict[str, float]]:
    """Return answers per second and peak bytes by batch size, for answers as long as those of `measure_latency`.

    Batch sizes that do not fit the device are left out.
    """
    measured = {}
    for size in settings.throughput_batch_sizes:
        try:
            inputs = model.inputs(representative(questions, size))
            memory.reset()
            timed = [_timed(model, inputs, settings.latency_new_tokens) for _ in range(1 + _REPEATS)]
        except MemoryError:
            log.warning("evaluate.throughput_batch_sizes: a batch of %d questions does not fit memory; left out", size)
            continue
        measured[str(size)] = {
            "answers_per_second": float(1000 * size / np.median(timed[1:])),
            "peak_bytes": memory.peak(),
        }
    return measured


def token_limit_ms(model: Measured) -> float:
    """Return the milliseconds in which the device moves as many bytes as a token of an answer reads.

    No engine that reads every weight for a token is faster at batch 1. The bandwidth is measured by a copy, which reads
    each byte and writes it. Weights that fit into caches are read faster than that.
    """
    copy = model.copying(_COPIED_BYTES)
    times = [_milliseconds(copy) for _ in range(1 + _REPEATS)]
    return model.token_bytes * float(np.median(times[1:])) / (2 * _COPIED_BYTES)


def _timed(model: Measured, inputs: Any, tokens: int) -> float:
    """Return the milliseconds that an answer of exactly `tokens` tokens takes."""
    return _milliseconds(lambda: model.generate(inputs, tokens))


def _milliseconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)

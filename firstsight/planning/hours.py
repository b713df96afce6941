"""Turn the plan's arithmetic into hours on a GPU, from what one GPU was measured to reach.

A stage takes its operations divided by the peak of the GPU and by the share of the peak that was reached, and, where
answers are given, the seconds of each of their tokens, which come one after the other. The shares and seconds were
measured on one H100 with random weights at true size, one run each (docs/benchmarks.md). For other GPUs they are
carried over: a slower GPU waits less for Python, and should reach a larger share.
Not counted are downloads, the building of data, quantizing, and the start of each stage.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

MEASURED = "NVIDIA H100"


@dataclass(frozen=True)
class Card:
    """Describe a GPU by its data sheet.

    `pattern` finds the name that PyTorch gives it; `operations` is the peak of dense 16-bit products with float32 sums,
    in floating-point operations a second.
    """

    name: str
    pattern: str
    operations: float


# NVIDIA's data sheets and white papers (H100 SXM5; H200, which computes as fast; A100; Ada; L4, whose figure there is
# for sparse products). Not GPUs without bfloat16: they train in float32, of which nothing was measured.
CARDS = (
    Card(MEASURED, r"H100 80GB HBM3", 989e12),
    Card("NVIDIA H200", r"H200", 989e12),
    Card("NVIDIA A100", r"A100", 312e12),
    Card("RTX 4090", r"RTX 4090$", 165.2e12),
    Card("NVIDIA L4", r"L4$", 121e12),
)

# Models with fewer parameters than these spend their time in Python, whatever they compute.
FEWEST_PARAMETERS = 100_000_000
# The lowest and highest share of the peak, by the plan's own count of operations: steps of the 2B student in full on
# 1,532 tokens, and with a frozen vision tower and cached visual tokens on 8,253; and the teacher's forward pass over
# videos of 16 frames.
TRAINING = (0.10, 0.24)
FORWARD = (0.194, 0.194)
# Seconds of an answer's token in a model of 28 layers at batch 1, without and with the prompt's share. Python and
# kernel launches take them, so neither the GPU nor the batch size changes them much. In 16 bits, the least is that of
# the 2B student by a CUDA graph, the most that of the 7B teacher without one. NF4 was not measured, nor was INT4, which
# counts as 16 bits, because its steps are replayed by graphs too.
TOKEN = {"int8": (0.075, 0.088), "nf4": (0.0074, 0.088)}
TOKEN_16_BIT = (0.0074, 0.028)

# Operations a second of an export of Qwen2-VL-2B on two cores of an AMD EPYC, as it reads a picture of 448 x 448 pixels
# (benchmarks/device.csv). Evaluating an export reads far more than it writes.
PROCESSOR = 0.1e12


@dataclass(frozen=True)
class Effort:
    """Hold what a stage computes: operations, whether it trains, and how many times an answer's next token is computed.

    `precision` is the one that answers are given in.
    """

    operations: float
    trains: bool = False
    tokens: float = 0.0
    precision: str = "auto"

    def hours(self, card: Card) -> tuple[float, float]:
        """Return the least and the most hours on the GPU, by what was measured."""
        low, high = TRAINING if self.trains else FORWARD
        fast, slow = TOKEN.get(self.precision, TOKEN_16_BIT)
        work = self.operations / card.operations
        return (work / high + self.tokens * fast) / 3600, (work / low + self.tokens * slow) / 3600


def known(name: str) -> Card | None:
    """Return the GPU that PyTorch calls by this name, or None."""
    return next((card for card in CARDS if re.search(card.pattern, name)), None)


def between(low: float, high: float) -> str:
    """Return a range of hours, with more digits for shorter ones: 0.612 and 1.54 give "0.61-1.5"."""
    ends = [f"{end:.2f}" if end < 1 else f"{end:.1f}" if end < 10 else f"{end:,.0f}" for end in (low, high)]
    return "-".join(dict.fromkeys(ends))


def total(efforts: Iterable[Effort], card: Card) -> tuple[float, float]:
    """Return the least and the most hours of all stages together."""
    ranges = [effort.hours(card) for effort in efforts]
    return sum(low for low, _ in ranges), sum(high for _, high in ranges)

"""Estimate how long a sample is for a model, so that batches are made of samples that need little padding."""

import io
import math
from collections.abc import Sequence

from PIL import Image

from firstsight.records.sample import Record, Sample, Text


def estimated_tokens(sample: Sample, records: Sequence[Record]) -> float:
    """Return about how many tokens the records of a sample take in one sequence.

    That is its pixels, of which 784 make a token of Qwen2-VL's, and the text of its questions, at 4 characters a token.
    """
    pixels = sum(math.prod(Image.open(io.BytesIO(frame)).size) for frame in sample.frames)
    read = sum(len(record.prompt()) + (len(record.answer) if isinstance(record, Text) else 0) for record in records)
    return pixels / 784 + read / 4


def longest_first(lengths: Sequence[float]) -> list[int]:
    """Return the numbers of sequences of these lengths, those of the longest first, and of equal ones in order."""
    return sorted(range(len(lengths)), key=lambda number: -lengths[number])

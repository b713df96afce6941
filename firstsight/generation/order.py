"""Order the test questions so that batches of them are padded little."""

import io
import math
from collections.abc import Sequence
from itertools import groupby

from PIL import Image

from firstsight.records.sample import Record, Sample, Text


def by_length(questions: Sequence[tuple[Sample, Record]]) -> list[int]:
    """Return the numbers of the questions, those with the longest sequences first.

    Questions about an image or video that follow each other still do. A sequence is as long as its pixels, of which 784
    make a token of Qwen2-VL's, and the text of its questions, at 4 characters a token.
    """
    by_sample = [list(group) for _, group in groupby(questions, key=lambda question: question[0].id)]
    lengths = [_length(group[0][0], [record for _, record in group]) for group in by_sample]
    of_question = [length for group, length in zip(by_sample, lengths, strict=True) for _ in group]
    return sorted(range(len(questions)), key=lambda number: -of_question[number])


def _length(sample: Sample, records: Sequence[Record]) -> float:
    """Estimate the tokens of the records of a sample in one sequence."""
    pixels = sum(math.prod(Image.open(io.BytesIO(frame)).size) for frame in sample.frames)
    read = sum(len(record.prompt()) + (len(record.answer) if isinstance(record, Text) else 0) for record in records)
    return pixels / 784 + read / 4

"""Order the test questions so that batches of them are padded little."""

from collections.abc import Sequence
from itertools import groupby

from firstsight.records.length import estimated_tokens, longest_first
from firstsight.records.sample import Record, Sample


def by_length(questions: Sequence[tuple[Sample, Record]]) -> list[int]:
    """Return the numbers of the questions, those with the longest sequences first, by `estimated_tokens`.

    Questions about an image or video that follow each other still do.
    """
    by_sample = [list(group) for _, group in groupby(questions, key=lambda question: question[0].id)]
    lengths = [estimated_tokens(group[0][0], [record for _, record in group]) for group in by_sample]
    of_question = [length for group, length in zip(by_sample, lengths, strict=True) for _ in group]
    return longest_first(of_question)

"""Limit the length of answers to what the true ones need, or warn that they need more."""

from collections.abc import Callable, Sequence

from firstsight.core.stage import log
from firstsight.records.sample import LETTERS, Record


def answer_limit(
    token_counts: Callable[[Sequence[str]], list[int]], records: Sequence[Record], limit: int | None
) -> int:
    """Return the most tokens that answers to `records` may have: `limit`, or if it is None, what the data needs.

    That is one token more than the longest true answer or option with its letter has, so that a longer answer is not
    cut to one of them. With a `limit`, a warning says to how many questions a true answer does not fit.

    Args:
        token_counts: returns the number of the model's tokens of each text, without special tokens around it.
    """
    if limit is None:
        texts = [text for record in records for text in (*record.answers, *_options(record))]
        return max(token_counts(texts)) + 1
    longest = [max(token_counts(record.answers)) for record in records]
    if cut := sum(length > limit for length in longest):
        log.warning(
            "evaluate.max_new_tokens: expected room for every true answer, found %d of %d questions with one of more "
            "than %d tokens, the longest of %d, which no model can give in full; raise it, or set it to null, which "
            "takes the limit from the data",
            cut,
            len(records),
            limit,
            max(longest),
        )
    return limit


def _options(record: Record) -> list[str]:
    return [f"({letter}) {option}" for letter, option in zip(LETTERS, record.options, strict=False)]

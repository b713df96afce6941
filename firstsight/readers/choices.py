"""Multiple choice as data sets have it: options with letters of their own, answers that are an index."""

import re
from collections.abc import Sequence
from typing import Any

from firstsight.readers.problems import BadRecordError
from firstsight.records.sample import LETTERS


def plain_options(options: Sequence[Any]) -> list[Any]:
    """Options without their letters, "A. a cup" as "a cup", where each has its own: the prompt gives them letters."""
    found = [re.fullmatch(r"\s*\(?([A-Z])[.):]\s*(\S.*)", str(option), re.DOTALL) for option in options]
    if [match and match[1] for match in found] == list(LETTERS[: len(found)]):
        return [match[2] for match in found]
    return list(options)


def chosen(answer: Any, options: Sequence[Any]) -> Any:
    """The option that an answer is by its index, from 0, also as text ("3"), or by its text; any other as it is.

    Args:
        options: as the data set has them; what is returned is one of `plain_options`.

    Raises:
        BadRecordError: there is no option of that index.
    """
    plain = plain_options(options)
    if answer in options and not isinstance(answer, bool):
        return plain[list(options).index(answer)]
    index = answer
    if isinstance(answer, str) and re.fullmatch(r"\s*\d{1,2}\s*", answer) and answer.strip() not in plain:
        index = int(answer)
    if isinstance(index, bool) or not isinstance(index, int) or not options:
        return answer
    if not 0 <= index < len(plain):
        raise BadRecordError(
            f"expected the answer to be an index of {len(plain)} options, from 0, found {repr(answer)[:60]}; correct it"
        )
    return plain[index]

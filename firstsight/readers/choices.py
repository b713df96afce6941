"""Normalise multiple choice as data sets store it: options that carry letters, and answers given as an index."""

import re
from collections.abc import Sequence
from typing import Any

from firstsight.readers.problems import BadRecordError
from firstsight.records.sample import LETTERS, composed


def plain_options(options: Sequence[Any]) -> list[Any]:
    """Return options without letters ("A. a cup" as "a cup") if all carry theirs in order: the prompt adds letters."""
    found = [re.fullmatch(r"\s*\(?([A-Z])[.):]\s*(\S.*)", str(option), re.DOTALL) for option in options]
    if [match and match[1] for match in found] == list(LETTERS[: len(found)]):
        return [match[2] for match in found]
    return list(options)


def chosen(answer: Any, options: Sequence[Any]) -> Any:
    """Return the option that `answer` names by its index from 0 (a number, or text such as "3") or by its text.

    An answer that names no option is returned unchanged.

    Args:
        options: as the data set stores them; the option returned is without its letter, see `plain_options`.

    Raises:
        BadRecordError: no option has that index.
    """
    options = [composed(option) if isinstance(option, str) else option for option in options]
    answer = composed(answer) if isinstance(answer, str) else answer
    plain = plain_options(options)
    if answer in options and not isinstance(answer, bool):
        return plain[options.index(answer)]
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

"""Report records that cannot be used: `data.on_error` says whether the first ends the run or all are counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from firstsight.core.errors import UserError

# The most problems that the data card lists; further ones are only counted.
LISTED = 1000


class BadRecordError(Exception):
    """Report that a record, its image or its video cannot be used: what was expected, what was found, what to do."""


def reason(error: Exception) -> str:
    """Return the first line of what a library says, or the kind of error where it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()


class Problems:
    """Collect the problems of a build, and in `left_out` the number of valid questions left out, by reason.

    Args:
        policy: `stop` raises UserError at the first problem; `skip` counts it and continues.
    """

    def __init__(self, policy: Literal["stop", "skip"]):
        self._policy = policy
        self.count = 0
        self.first: list[str] = []
        self.left_out: Counter[str] = Counter()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Report a BadRecordError raised in the block. `place` is the record's file and line, or its key."""
        try:
            yield
        except BadRecordError as error:
            self.report(place, str(error))

    def report(self, place: str, message: str) -> None:
        """Count and list a problem with the record at `place`.

        Raises:
            UserError: the policy is `stop`.
        """
        # Names of files may hold line breaks.
        line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in f"{place}: {message}")
        if self._policy == "stop":
            raise UserError(f"{line}, or set data.on_error to skip")
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(line)

    def card(self) -> dict[str, Any]:
        """Return the number of problems and the first ones, for the data card."""
        return {"count": self.count, "first": self.first}

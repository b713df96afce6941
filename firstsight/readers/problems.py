"""Records that cannot be used: the first ends the run, or all are counted and listed, as `data.on_error` says."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from firstsight.core.errors import UserError

# Listed whole in the data card; beyond it only counted.
LISTED = 1000


class BadRecordError(Exception):
    """One record, or its media, cannot be used. The message says what was expected, what was found, and what to do."""


class Problems:
    """What was wrong with which record; and, in `left_out`, how much is left out by reason though nothing is wrong.

    Args:
        policy: `stop` raises UserError at the first problem; `skip` counts it and goes on.
    """

    def __init__(self, policy: Literal["stop", "skip"]):
        self._policy = policy
        self.count = 0
        self.first: list[str] = []
        self.left_out: Counter[str] = Counter()

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Meets a BadRecordError that is raised in the block. `place` names file and line, or key, of the record."""
        try:
            yield
        except BadRecordError as error:
            self.meet(place, str(error))

    def meet(self, place: str, message: str) -> None:
        """
        Raises:
            UserError: the policy is to stop.
        """
        if self._policy == "stop":
            raise UserError(f"{place}: {message}, or set data.on_error to skip")
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(f"{place}: {message}")

    def card(self) -> dict[str, Any]:
        """For the data card."""
        return {"count": self.count, "first": self.first}

"""Say by which figure of quality variants are compared: exact answers or, of texts, perplexity."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """Name the figure that variants are compared by, and the one that is shown beside it: their keys and labels.

    `gain` is the key of the difference between two variants, which is above 0 for the better one, and `what` that of
    the number of records, which names them too.
    """

    name: str
    label: str
    beside: str
    beside_label: str
    gain: str
    gain_label: str
    what: str

    def said(self, row: dict[str, Any]) -> str:
        """Return the figure of a row of metrics/quality.json with its interval."""
        figure, low, high = (row[self.name + end] for end in ("", "_low", "_high"))
        return f"{figure:.2f} ({low:.1f}-{high:.1f})" if self is TEXTS else f"{figure:.3f} ({low:.2f}-{high:.2f})"


ANSWERS = Measure(
    name="exact_match",
    label="exact match",
    beside="f1",
    beside_label="F1",
    gain="gain",
    gain_label="gain",
    what="questions",
)
# Of texts, the lower perplexity is the better one.
TEXTS = Measure(
    name="perplexity",
    label="perplexity",
    beside="bits_per_byte",
    beside_label="bits/byte",
    gain="perplexity_saved",
    gain_label="saved",
    what="texts",
)


def measure_of(quality: dict[str, dict[str, Any]]) -> Measure:
    """Return the measure of a table of rows by variant, as metrics/quality.json is."""
    return TEXTS if any(TEXTS.name in row for row in quality.values()) else ANSWERS

"""Plain-text tables and sizes, for a terminal and for summary.txt."""

from collections.abc import Sequence

import tabulate

# By default a column is at least two characters wider than its header.
tabulate.MIN_PADDING = 0


def size(count: float, unit: str = "B") -> str:
    """Return a count with a decimal prefix and at most three digits: 1234567 gives "1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if abs(count) < 999.5 or prefix == "G":
            return f"{count:.3g} {prefix}{unit}".rstrip()
        count /= 1000
    raise AssertionError


def render(cells: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return `cells` as a table with the first row as header, the first `left` columns aligned left, the rest right."""
    header, *body = cells
    alignment = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate.tabulate(body, header, "simple", colalign=alignment, disable_numparse=True)

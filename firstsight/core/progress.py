"""Show how far work has come: a bar on a terminal; elsewhere a line at most every ten seconds, and one at the end."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from firstsight.core.processes import is_main_process

# Seconds between two lines, and what they say.
_INTERVAL = 10
_LINE = "{desc}: {n_fmt}/{total_fmt}{unit}, {elapsed} elapsed, {remaining} remaining"


def on_terminal() -> bool:
    """Return whether stderr, on which progress is shown, is a terminal, and not a log file or a pipe."""
    return sys.stderr.isatty()


def progress(iterable: Iterable | None = None, *, desc: str, unit: str, total: int, initial: int = 0) -> tqdm:
    """Return a tqdm over `iterable`, or one to be updated; it shows nothing if nothing is left to be done.

    Of several processes, the main one shows it alone.

    Args:
        unit: the plural of what is counted.
        initial: how many of the `total` an earlier run has done.
    """
    shown = tqdm if on_terminal() else _Lines
    options = {"desc": desc, "unit": f" {unit}", "total": total, "initial": initial, "dynamic_ncols": True}
    return shown(iterable, disable=initial >= total or not is_main_process(), **options)


class _Lines(tqdm):
    """Print complete lines, for a file would keep every state of a bar."""

    def __init__(self, *arguments: Any, **named: Any):
        # After every step it is asked for the time, and for the mean rate since the start.
        regular = {"mininterval": _INTERVAL, "delay": _INTERVAL, "miniters": 1, "smoothing": 0}
        super().__init__(*arguments, **(named | regular | {"bar_format": _LINE}))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True

"""Run the pipeline by DVC and come back when it has ended."""

import signal
import subprocess
import sys

from firstsight.core.errors import UserError


def repro() -> None:
    """Run `dvc repro` to its end. An interrupt from the keyboard reaches it by itself, and is left to it.

    Raises:
        KeyboardInterrupt: it was interrupted.
        UserError: it failed.
    """
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        with subprocess.Popen([sys.executable, "-m", "dvc", "repro"]) as process:
            try:
                status = process.wait()
            except SystemExit:  # told to end by SIGTERM
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
    if status:
        raise UserError(f"dvc repro: expected it to run to its end, found status {status}, as it says above")

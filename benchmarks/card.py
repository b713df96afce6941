"""Measure what a GPU makes of FirstSight, most important first: the loss, a step, answers, the memory of all stages.

    python -m benchmarks.card [MINUTES]      8 by default; any CUDA machine with requirements.txt, or less

Runs the benchmarks of `PARTS` one after the other. Each has a share of the time, and what it leaves is for those after
it; when its share is over, it is ended. It writes its CSV file after every row, most important first, so that what was
measured until then is kept. Libraries that are not installed are named, and what needs them is left out. The models
have random weights, and nothing is downloaded.
"""

import os
import signal
import subprocess
import sys
import time

from firstsight.core.stage import log, main

PARTS = {"loss": 0.12, "distill_step": 0.45, "answering": 0.23, "attention": 0.05, "true_size": 0.15}
# Seconds that a part has for ending its own processes.
_GRACE = 10


def run() -> None:
    seconds = 60 * float(sys.argv[1] if len(sys.argv) > 1 else 8)
    deadline = time.monotonic()
    for part, share in PARTS.items():
        deadline += share * seconds
        left = deadline - time.monotonic()
        if left <= 0:
            log.warning("benchmarks.%s: left out, because the time is over", part)
            continue
        started = time.monotonic()
        ended = within(left, [sys.executable, "-m", f"benchmarks.{part}"])
        log.info("benchmarks.%s: %s after %.0f s", part, ended, time.monotonic() - started)


def within(seconds: float, words: list[str]) -> str:
    """Run a command, and end it and all its processes after so many seconds; return how it ended, in words."""
    with subprocess.Popen(words, start_new_session=True) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "ended, because the time is over,"
        finally:  # also when this process is interrupted
            if process.poll() is None:
                end(process)
    return "done" if status == 0 else f"failed with status {status}"


def end(process: subprocess.Popen) -> None:
    """End a process and those that it has started: a GPU's memory is free when they are gone."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(run)

"""What every stage script begins with: quiet libraries, a fixed seed, and one line for a user's mistake."""

import logging
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

from firstsight.core.errors import Unfinished, UserError
from firstsight.core.faults import in_words
from firstsight.core.launch import LOST
from firstsight.core.launchers import end_with_launchers
from firstsight.core.processes import first_to_fail, has_lost_another, is_main_process

# With a handler of its own, because libraries set the root logger as they please.
log = logging.getLogger("firstsight")
log.setLevel(logging.INFO)
log.propagate = False
log.addHandler(logging.StreamHandler(sys.stderr))


def main(run: Callable[..., None], choices: Collection[str] | None = None) -> None:
    """Run a stage or another command.

    A `UserError`, or a fault of the machine (`faults.in_words`), is printed as one line on stderr without a traceback,
    and ends the process with status 1. So is `Unfinished`, with status 75 (EX_TEMPFAIL of sysexits.h): run again, the
    command resumes. Of several processes, only the first that fails says why.

    Args:
        choices: what the one argument of a stage may be, which `run` is then called with; empty for a stage without
            arguments. `--help` prints the docstring of the stage's module, and nothing is run. None leaves the
            arguments to `run`.
    """
    if choices is not None and {"-h", "--help"} & set(sys.argv[1:]):
        if is_main_process():
            print(sys.modules[run.__module__].__doc__, end="")
        return
    _in_utf8()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|bitsandbytes|accelerate)(\.|$)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _told_to_end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, _hung_up)
    if not is_main_process():
        log.setLevel(logging.ERROR)  # what the main process says holds for all
    end_with_launchers()
    try:
        run(*([] if choices is None else _checked(sys.argv[1:], choices)))
    except (Exception, KeyboardInterrupt) as error:
        status, line = _in_one_line(error)
        # Ended by its launcher, because another process has failed, it must not fail a second time as it leaves.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if status != LOST and first_to_fail():
            if line is None:
                raise
            print(line, file=sys.stderr)
        sys.exit(status)


def _in_one_line(error: BaseException) -> tuple[int, str | None]:
    """Return the status with which the error ends a stage, and what is said of it; None for a traceback."""
    if isinstance(error, UserError):
        # A data worker's error arrives with its traceback before it.
        line = str(error).rsplit("UserError: ", 1)[-1]
        return 1, f"error: {' '.join(line.split())}"
    if isinstance(error, Unfinished):
        return os.EX_TEMPFAIL, f"unfinished: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted; run it again to resume"
    if has_lost_another(error):
        return LOST, None
    line = in_words(error) if isinstance(error, Exception) else None
    return 1, line and f"error: {line}"


def _checked(arguments: list[str], choices: Collection[str]) -> list[str]:
    """Return the arguments of a stage: one of the choices, or none if there are none. Raise UserError for others."""
    if len(arguments) == bool(choices) and set(arguments) <= set(choices):
        return arguments
    spec = sys.modules["__main__"].__spec__
    name = spec.name if spec else Path(sys.argv[0]).stem
    expected = f"one of {', '.join(choices)}" if choices else "no argument"
    raise UserError(f"{name}: expected {expected}, found {' '.join(arguments) or 'none'}; --help says what it does")


def _in_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if file names have another encoding: data may be in any script.

    Python chooses that mode itself in the C locale, but not in locales of older encodings.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _told_to_end(number: int, _: object) -> None:
    """Exit by an exception, so that unfinished outputs are removed, which another signal must not interrupt.

    A closed terminal and a launcher that died of it both tell a stage to end.
    """
    signal.signal(number, lambda *_: None)  # not SIG_IGN, which a process that is being started would inherit
    sys.exit(128 + number)


def _hung_up(*_: object) -> None:
    """End as on SIGTERM when the terminal was closed, without output: writing to it would raise an error first."""
    silence = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):
        if not stat.S_ISREG(os.fstat(output).st_mode):  # a log file stays open; the reader of a pipe is ending too
            os.dup2(silence, output)
    os.close(silence)
    signal.raise_signal(signal.SIGTERM)

"""Find, check and prune the checkpoints of a training, from which it resumes as if it had not been interrupted."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback

from firstsight.core.errors import Unfinished, UserError
from firstsight.core.files import fingerprint_files, write_json
from firstsight.core.stage import log

# SHA-256 of every other file of a checkpoint. Written last: a checkpoint without it is incomplete.
_CHECKSUMS = "checkpoint.json"
_VARIABLE = "FIRSTSIGHT_CHECKPOINT_SECONDS"


def mark_complete(checkpoint: Path) -> None:
    """Write the checksums of a checkpoint's files, without which it counts as incomplete."""
    write_json(checkpoint / _CHECKSUMS, _fingerprints(checkpoint))


def latest_usable(scratch: Path) -> Path | None:
    """Return the checkpoint to resume from: the last that is complete and whose best epoch's checkpoint is too.

    Later ones are removed, with a warning. None if no checkpoint is usable.
    """
    for checkpoint in reversed(_by_step(scratch)):
        defect = _defect(checkpoint) or _defect(best_checkpoint(checkpoint))
        if defect is None:
            return checkpoint
        log.warning("%s cannot be used (%s); going back to the checkpoint before it", checkpoint, defect)
        shutil.rmtree(checkpoint)
    return None


def prune(scratch: Path) -> None:
    """Remove all checkpoints but the last two, the earlier in case the last is damaged, and the best epoch's of each.

    These are three at most: the best of the last is either itself or the best of the earlier.
    """
    kept = _by_step(scratch)[-2:]
    kept += [best_checkpoint(checkpoint) for checkpoint in kept]
    for checkpoint in set(_by_step(scratch)) - set(kept):
        shutil.rmtree(checkpoint)


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read the Trainer's state from a complete checkpoint."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def best_checkpoint(checkpoint: Path) -> Path:
    """Return the checkpoint of the best epoch up to this one; this one if no epoch has ended."""
    step = trainer_state(checkpoint)["best_global_step"]
    return checkpoint if step is None else checkpoint.with_name(f"checkpoint-{step}")


def is_final(checkpoint: Path) -> bool:
    """Return whether training ended at this checkpoint, after its last epoch or by early stopping."""
    return trainer_state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step after which a checkpoint was made."""
    return int(checkpoint.name.split("-")[1])


def _by_step(scratch: Path) -> list[Path]:
    return sorted((path for path in scratch.glob("checkpoint-*") if path.name[11:].isdigit()), key=step_of)


def _interval() -> float:
    """Return the seconds between two checkpoints within an epoch."""
    try:
        return float(os.environ.get(_VARIABLE, "600"))
    except ValueError:
        raise UserError(f"{_VARIABLE}: expected a number of seconds, found {os.environ[_VARIABLE]!r}") from None


def _fingerprints(checkpoint: Path) -> dict[str, str]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _CHECKSUMS]
    return {str(path.relative_to(checkpoint)): fingerprint_files([path]) for path in files}


def _defect(checkpoint: Path) -> str | None:
    """Return why a checkpoint is unusable, or None."""
    try:
        expected = json.loads((checkpoint / _CHECKSUMS).read_text(encoding="utf-8"))
        found = _fingerprints(checkpoint)
    except FileNotFoundError:
        return f"{checkpoint.name} is incomplete"
    except (OSError, ValueError) as error:
        return f"{checkpoint.name} cannot be read: {error}"
    if not isinstance(expected, dict):
        return f"{checkpoint.name}/{_CHECKSUMS} is damaged"
    damaged = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"{checkpoint.name}/{damaged[0]} is damaged" if damaged else None


class CheckpointCallback(TrainerCallback):
    """Request a checkpoint at regular times within an epoch, and a last one after a stop was requested.

    The main process decides for all, because they write a checkpoint together.

    Raises:
        Unfinished: a stop was requested and the checkpoint is written.
        UserError: FIRSTSIGHT_CHECKPOINT_SECONDS is not a number.
    """

    def __init__(self):
        self._interval, self._last, self._stop_requested = _interval(), time.monotonic(), False

    def request_stop(self, *_signal: object) -> None:
        """Request a stop after the current step; usable as a signal handler."""
        self._stop_requested = True

    def on_step_end(self, args, state, control, **kwargs):
        # At the end of an epoch or of training, the checkpoint is made after the evaluation, to include its result.
        if not (control.should_training_stop or state.epoch.is_integer()):
            due = self._stop_requested or time.monotonic() - self._last >= self._interval
            control.should_save = _decision_of_main_process(due)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = True  # the loss of the steps since the last logged one

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
        if _decision_of_main_process(self._stop_requested):
            raise Unfinished(f"stopped by a signal after step {state.global_step} of {state.max_steps}; run it again")


def _decision_of_main_process(decision: bool) -> bool:
    if PartialState().num_processes == 1:
        return decision
    return broadcast_object_list([decision])[0]


@contextmanager
def signal_handler(signals: Iterable[signal.Signals], handler: Callable[..., None]) -> Iterator[None]:
    """Have `handler` called for these signals within the block."""
    before = {one: signal.signal(one, handler) for one in signals}
    try:
        yield
    finally:
        for one, previous in before.items():
            signal.signal(one, previous)

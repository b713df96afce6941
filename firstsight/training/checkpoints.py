"""Checkpoints of a training: each whole or not counted, few of them, and enough to go on as if nothing had happened."""

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

# SHA-256 of every other file of a checkpoint. Written last: a folder without it is one that was being written.
_SEAL = "checkpoint.json"
# Of a trained parameter in a checkpoint: its weight and AdamW's two moments, in float32.
BYTES_PER_PARAMETER = 3 * 4
_VARIABLE = "FIRSTSIGHT_CHECKPOINT_SECONDS"


def seal(checkpoint: Path) -> None:
    """Declare a checkpoint whole, as its files are now."""
    write_json(checkpoint / _SEAL, _fingerprints(checkpoint))


def newest(scratch: Path) -> Path | None:
    """The checkpoint to go on from: the last that is whole, and whose best epoch's is whole. Says which are not, and
    removes them."""
    for checkpoint in reversed(_in_order(scratch)):
        flaw = _flaw(checkpoint) or _flaw(best(checkpoint))
        if flaw is None:
            return checkpoint
        log.warning("%s cannot be used (%s); going back to the checkpoint before it", checkpoint, flaw)
        shutil.rmtree(checkpoint)
    return None


def prune(scratch: Path) -> None:
    """Keep the last two checkpoints, the second for when the last is damaged, and of each the best epoch's: three at
    most, as two of different epochs have one between them."""
    kept = _in_order(scratch)[-2:]
    kept += [best(checkpoint) for checkpoint in kept]
    for checkpoint in set(_in_order(scratch)) - set(kept):
        shutil.rmtree(checkpoint)


def state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's account of a checkpoint that is whole."""
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def best(checkpoint: Path) -> Path:
    """The checkpoint of the best epoch up to this one; itself where no epoch has ended."""
    step = state(checkpoint)["best_global_step"]
    return checkpoint if step is None else checkpoint.with_name(f"checkpoint-{step}")


def ended(checkpoint: Path) -> bool:
    """Whether training was over, by the number of epochs or by stopping early."""
    return state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _in_order(scratch: Path) -> list[Path]:
    return sorted((path for path in scratch.glob("checkpoint-*") if path.name[11:].isdigit()), key=step_of)


def _seconds() -> float:
    """Between two checkpoints of an epoch."""
    try:
        return float(os.environ.get(_VARIABLE, "600"))
    except ValueError:
        raise UserError(f"{_VARIABLE}: expected a number of seconds, found {os.environ[_VARIABLE]!r}") from None


def _fingerprints(checkpoint: Path) -> dict[str, str]:
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != _SEAL]
    return {str(path.relative_to(checkpoint)): fingerprint_files([path]) for path in files}


def _flaw(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything."""
    try:
        sealed = json.loads((checkpoint / _SEAL).read_text(encoding="utf-8"))
        found = _fingerprints(checkpoint)
    except FileNotFoundError:
        return f"{checkpoint.name} is not whole"
    except (OSError, ValueError) as error:
        return f"{checkpoint.name} cannot be read: {error}"
    if not isinstance(sealed, dict):
        return f"{checkpoint.name}/{_SEAL} is damaged"
    damaged = sorted(name for name in sealed.keys() | found.keys() if sealed.get(name) != found.get(name))
    return f"{checkpoint.name}/{damaged[0]} is damaged" if damaged else None


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so often within an epoch, and for a last one when the process is told to end.

    The main process decides for all, because they write a checkpoint together.

    Raises:
        Unfinished: told to end, and the checkpoint is made.
        UserError: FIRSTSIGHT_CHECKPOINT_SECONDS is no number.
    """

    def __init__(self):
        self._seconds, self._last, self._told = _seconds(), time.monotonic(), False

    def tell(self, *_signal: object) -> None:
        """A signal handler: end after this step."""
        self._told = True

    def on_step_end(self, args, state, control, **kwargs):
        # Where an epoch or the training ends, the checkpoint is made after the evaluation, or it would be left out.
        if not (control.should_training_stop or state.epoch.is_integer()):
            due = self._told or time.monotonic() - self._last >= self._seconds
            control.should_save = _as_the_main_process(due)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = True  # of the steps since the last that was logged

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
        if _as_the_main_process(self._told):
            raise Unfinished(f"stopped by a signal after step {state.global_step} of {state.max_steps}; run it again")


def _as_the_main_process(decided: bool) -> bool:
    if PartialState().num_processes == 1:
        return decided
    return broadcast_object_list([decided])[0]


@contextmanager
def handling(signals: Iterable[signal.Signals], handler: Callable[..., None]) -> Iterator[None]:
    """In the block, `handler` is called for these signals."""
    before = {one: signal.signal(one, handler) for one in signals}
    try:
        yield
    finally:
        for one, previous in before.items():
            signal.signal(one, previous)

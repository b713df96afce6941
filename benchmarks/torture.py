"""Kill the pipeline at random moments, run it again each time, and compare the end with that of a run without kills.

    python -m benchmarks.torture [KILLS [SEED]]      make torture: 24 kills, a quarter of an hour on one core

Works on copies of the repository in a temporary folder, with the smoke preset, longer training, and checkpoints at
every step. Of nine kills five are SIGKILL to the stage, two to all processes at once, one to DVC alone, and one is
SIGTERM to DVC alone. Ends with status 1 unless weights, data, targets, predictions and metrics (but timings) are the
same bytes, and no process, lock or partial output is left.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from firstsight.core import yaml12
from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files
from firstsight.core.stage import log, main

ROOT = Path(__file__).parents[1]
# Left out of a copy: what is made here, and what belongs to a checkout.
_MADE = (".git", ".venv*", ".scratch", "cache", "tmp", "config.local", "__pycache__", ".*_cache")
_OUTPUTS = ("data/egoqa", "data/teacher-targets", "models", "evaluations", "metrics")
# Files that hold timings, and the pictures and pages made of them.
_TIMED = re.compile(r"performance\.json|variants\.csv|report\.html|summary\.txt|.*\.png")
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
VICTIMS = {"the stage": _KILL, "everything": _KILL, "DVC alone": _KILL, "DVC alone, told to end": _TERM}
_WEIGHTS = (5, 2, 1, 1)


def new_project(folder: Path, **training: float) -> Path:
    """A copy of the repository before anything is run: the smoke preset, both trainings changed by `training`."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_MADE))
    for output in _OUTPUTS:
        for path in (folder / output).rglob("*"):
            if path.is_file() and path.name != ".gitignore":
                path.unlink()
    (folder / "dvc.lock").unlink(missing_ok=True)
    values = yaml12.load(folder / "presets/smoke.yaml")
    for section in ("finetune_teacher", "train"):
        values[section] |= training
    (folder / "params.yaml").write_text(yaml12.dump(values))
    subprocess.run(["dvc", "config", "--local", "core.no_scm", "true"], cwd=folder, check=True)
    return folder


def outcome(project: Path) -> dict[str, str]:
    """SHA-256 of every output file, but of those with timings."""
    files = [path for output in _OUTPUTS for path in sorted((project / output).rglob("*")) if path.is_file()]
    kept = [path for path in files if not _TIMED.fullmatch(path.name) and path.name != ".gitignore"]
    return {str(path.relative_to(project)): fingerprint_files([path]) for path in kept}


@dataclass
class Kill:
    """Of whom, in which stage, after what part of the seconds that it took without."""

    stage: str
    part: float
    victim: str


class Repro:
    """`dvc repro` in a project, in a session of its own; `stages` tells when each began."""

    def __init__(self, project: Path):
        self.project, self.stages, self.text = project, {}, ""
        environment = os.environ | {"FIRSTSIGHT_CHECKPOINT_SECONDS": "0", "FIRSTSIGHT_SCRATCH": ""}
        self.process = subprocess.Popen(
            ["dvc", "repro"],
            cwd=project,
            env=environment,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.text += line
            if begun := re.match(r"Running stage '([^']+)'", line):
                self.stages[begun[1]] = time.monotonic()

    def wait(self) -> int:
        """Its status, when all that it started has ended too."""
        status = self.process.wait()
        self._reader.join()  # the pipe is open as long as anyone has it
        return status

    def kill(self, kills: deque[Kill], seconds: dict[str, float]) -> tuple[str, str] | None:
        """Kill at the next moment that comes; which stage was killed, and who of it. None when the run ended before.

        That kill is taken from `kills`, and those that are missed: a stage that goes on may end before.
        """
        while kills:
            kill = kills.popleft()
            if self._comes(kill, seconds):
                break
        else:
            return None
        if kill.victim.startswith("DVC"):
            victims = [self.process.pid]
        else:
            found = processes(self.project)
            victims = [one for one, words in found.items() if kill.victim == "everything" or at_work(words)]
        for victim in victims:
            try:
                os.kill(victim, VICTIMS[kill.victim])
            except ProcessLookupError:
                continue  # it has just ended by itself
        stage = list(self.stages)[-1]
        log.info("killed %s in %s, %.0f%% through %s", kill.victim, stage, 100 * kill.part, kill.stage)
        return stage, kill.victim

    def _comes(self, kill: Kill, seconds: dict[str, float]) -> bool:
        """Wait for a kill's moment; false when it is not to come."""
        stages = list(seconds)
        later = stages[stages.index(kill.stage) + 1 :]
        while self.process.poll() is None and not any(stage in self.stages for stage in later):
            begun = self.stages.get(kill.stage, float("inf"))
            if time.monotonic() >= begun + kill.part * seconds[kill.stage]:
                return True
            time.sleep(0.01)
        return False


def processes(project: Path) -> dict[int, str]:
    """The command lines of the processes at work in a project, by id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == project:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended, or is another user's
    return found


def at_work(words: str) -> bool:
    """Whether a command line is a stage's own, rather than of what launched it."""
    return "stages." in words and "accelerate" not in words


def leftovers(project: Path) -> list[str]:
    """What should not be there after a run has ended well."""
    paths = [*project.rglob("*.partial"), *(project / ".scratch").glob("*")]
    return [*(str(path.relative_to(project)) for path in paths), *processes(project).values()]


def durations(repro: Repro) -> dict[str, float]:
    """Seconds that each stage took of a run that has just ended."""
    moments = [*repro.stages.values(), time.monotonic()]
    return {stage: moments[number + 1] - moments[number] for number, stage in enumerate(repro.stages)}


def campaign(project: Path, kills: list[Kill], seconds: dict[str, float]) -> list[tuple[str, str]]:
    """Kill and run again, then run to the end; the stages that were killed, in order, and who of each.

    Raises:
        UserError: a run ended otherwise than well, or left something behind.
    """
    killed, waiting = [], deque(kills)
    while waiting:
        repro = Repro(project)
        one = repro.kill(waiting, seconds)
        status = repro.wait()
        if one is not None:
            killed.append(one)
        elif status:
            raise UserError(f"{project}: expected dvc repro to go on, found status {status}: {repro.text[-3000:]}")
    last = Repro(project)
    if last.wait():
        raise UserError(f"{project}: expected dvc repro to end well after the kills, found: {last.text[-3000:]}")
    if left := leftovers(project):
        raise UserError(f"{project}: expected nothing to be left behind, found {', '.join(left)}")
    return killed


def compare(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raises UserError unless the outcomes are the same."""
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise UserError(f"expected the outcome of a run that nobody killed, found others: {', '.join(different)}")


def plan(stages: list[str], number: int, chance: random.Random) -> list[Kill]:
    """Kills in the order of the stages, each stage having its share, at random moments."""
    shares = sorted((stages * number)[:number], key=stages.index)
    victims = chance.choices(list(VICTIMS), _WEIGHTS, k=number)
    return [Kill(stage, chance.random(), victim) for stage, victim in zip(shares, victims, strict=True)]


def run() -> None:
    number, seed = [*map(int, sys.argv[1:]), *(24, 0)[len(sys.argv) - 1 :]]
    chance = random.Random(seed)
    total: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        whole = Repro(new_project(folder / "whole", epochs=4, batch_size=4))
        if whole.wait():
            raise UserError(f"dvc repro: expected it to end well, found: {whole.text[-3000:]}")
        seconds, expected = durations(whole), outcome(whole.project)
        log.info("without a kill: %.0f s, %d files to compare", sum(seconds.values()), len(expected))
        for round_ in range(number):  # as often as it takes
            if (left := number - total.total()) == 0:
                break
            project = new_project(folder / f"killed-{round_}", epochs=4, batch_size=4)
            stages = list(seconds) if left >= len(seconds) else chance.sample(list(seconds), left)
            total.update(campaign(project, plan(sorted(stages, key=list(seconds).index), left, chance), seconds))
            compare(expected, outcome(project))
            shutil.rmtree(project)
    for name, place in (("stages", 0), ("victims", 1)):
        counts: Counter[str] = Counter()
        for kill, times in total.items():
            counts[kill[place]] += times
        log.info("%s: %s", name, ", ".join(f"{one} {times}" for one, times in counts.items()))
    log.info("%d kills, and the outcome is the same each time", total.total())


if __name__ == "__main__":
    main(run)

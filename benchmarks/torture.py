"""Kill the pipeline at random moments, rerun it each time, and compare its outputs with those of a run without kills.

    python -m benchmarks.torture [KILLS [SEED]]      make torture: 24 kills, a quarter of an hour on one core

Works on copies of the repository in a temporary folder, with the smoke preset, longer training, and checkpoints at
every step. Of nine kills on average five are SIGKILL to the stage, two to all processes at once, one to DVC only, and
one is SIGTERM to DVC only. Exits with status 1 unless weights, data, targets, predictions and metrics (except timings)
are the same bytes, and no process, lock or partial output is left.
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
# Not copied: caches, environments and what belongs to a checkout.
_MADE = (".git", ".venv*", ".scratch", "cache", "tmp", "config.local", "__pycache__", ".*_cache")
_OUTPUTS = ("data/egoqa", "data/teacher-targets", "data/visual-tokens", "models", "evaluations", "metrics")
# Files that hold timings, and the figures and pages made from them.
_TIMED = re.compile(r"(performance|metrics)\.json|variants\.csv|report\.html|summary\.txt|.*\.png")
_KILL, _TERM = signal.SIGKILL, signal.SIGTERM
VICTIMS = {"the stage": _KILL, "everything": _KILL, "DVC alone": _KILL, "DVC alone, told to end": _TERM}
_WEIGHTS = (5, 2, 1, 1)


def new_project(folder: Path, **training: float) -> Path:
    """Copy the repository without outputs, with the smoke preset, and `training` changed in both training stages."""
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
    """Return the SHA-256 of every output file except those with timings, by path."""
    files = [path for output in _OUTPUTS for path in sorted((project / output).rglob("*")) if path.is_file()]
    kept = [path for path in files if not _TIMED.fullmatch(path.name) and path.name != ".gitignore"]
    return {str(path.relative_to(project)): fingerprint_files([path]) for path in kept}


@dataclass
class Kill:
    """A kill: the stage, the moment as a fraction of the stage's seconds without kills, and the processes to kill."""

    stage: str
    part: float
    victim: str


class Repro:
    """Run `dvc repro` in a project, in its own session, as far as the stage `last`, or to the end.

    `stages` holds the time at which each stage began.
    """

    def __init__(self, project: Path, last: str | None = None):
        self.project, self.stages, self.text = project, {}, ""
        environment = os.environ | {"FIRSTSIGHT_CHECKPOINT_SECONDS": "0", "FIRSTSIGHT_SCRATCH": ""}
        self.process = subprocess.Popen(
            ["dvc", "repro", *([last] if last else [])],
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
        """Return the exit status, once all processes that it started have exited too."""
        status = self.process.wait()
        self._reader.join()  # the pipe stays open until the last process exits
        return status

    def kill(self, kills: deque[Kill], seconds: dict[str, float]) -> tuple[str, str] | None:
        """Wait for the first of `kills` that can be carried out, and kill.

        Returns the stage that was killed and the victim, or None if the run ended before. Removes from `kills` that
        kill and the missed ones before it: a resumed stage may end before the moment of its kill.
        """
        while kills:
            kill = kills.popleft()
            if self._wait_for(kill, seconds):
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
                continue  # it has just exited
        stage = list(self.stages)[-1]
        log.info("killed %s in %s, %.0f%% through %s", kill.victim, stage, 100 * kill.part, kill.stage)
        return stage, kill.victim

    def _wait_for(self, kill: Kill, seconds: dict[str, float]) -> bool:
        """Wait for the moment of a kill; return False if it will not come."""
        stages = list(seconds)
        later = stages[stages.index(kill.stage) + 1 :]
        while self.process.poll() is None and not any(stage in self.stages for stage in later):
            begun = self.stages.get(kill.stage, float("inf"))
            if time.monotonic() >= begun + kill.part * seconds[kill.stage]:
                return True
            time.sleep(0.01)
        return False


def processes(project: Path) -> dict[int, str]:
    """Return the command lines of the processes whose working directory is the project, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cwd").resolve() == project:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has exited, or belongs to another user
    return found


def at_work(words: str) -> bool:
    """Return whether a command line is a stage's, rather than its launcher's."""
    return "stages." in words and "accelerate" not in words


def leftovers(project: Path) -> list[str]:
    """Return partial outputs, scratch folders and processes, of which none should be left after a successful run."""
    paths = [*project.rglob("*.partial"), *(project / ".scratch").glob("*")]
    return [*(str(path.relative_to(project)) for path in paths), *processes(project).values()]


def durations(repro: Repro) -> dict[str, float]:
    """Return the seconds of each stage of a run that has just ended."""
    moments = [*repro.stages.values(), time.monotonic()]
    return {stage: moments[number + 1] - moments[number] for number, stage in enumerate(repro.stages)}


def campaign(
    project: Path, kills: list[Kill], seconds: dict[str, float], last: str | None = None
) -> list[tuple[str, str]]:
    """Run and kill until no kills are left, then run to the end; return each killed stage with its victim.

    The end is that of the stage `last`, or of the pipeline.

    Raises:
        UserError: a run failed without being killed, or left something behind.
    """
    killed, waiting = [], deque(kills)
    while waiting:
        repro = Repro(project, last)
        one = repro.kill(waiting, seconds)
        status = repro.wait()
        if one is not None:
            killed.append(one)
        elif status:
            raise UserError(f"{project}: expected dvc repro to resume, found status {status}: {repro.text[-3000:]}")
    repro = Repro(project, last)
    if repro.wait():
        raise UserError(f"{project}: expected dvc repro to succeed after the kills, found: {repro.text[-3000:]}")
    if left := leftovers(project):
        raise UserError(f"{project}: expected nothing to be left behind, found {', '.join(left)}")
    return killed


def compare(expected: dict[str, str], found: dict[str, str]) -> None:
    """Raise UserError unless the outcomes are the same."""
    if different := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
        raise UserError(f"expected the outcome of a run without kills, found others: {', '.join(different)}")


def plan(stages: list[str], number: int, chance: random.Random) -> list[Kill]:
    """Return `number` kills at random moments, spread evenly over the stages, in the order of the stages."""
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
            raise UserError(f"dvc repro: expected success, found: {whole.text[-3000:]}")
        seconds, expected = durations(whole), outcome(whole.project)
        log.info("without a kill: %.0f s, %d files to compare", sum(seconds.values()), len(expected))
        for round_ in range(number):  # at most: a round may miss kills
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

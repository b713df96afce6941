"""Run stages of the pipeline that do not depend on each other side by side, each by a DVC of its own.

DVC runs one stage after the other. A small model leaves most cores idle then: more threads make it no faster, and a
second stage beside it does.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from queue import SimpleQueue

from firstsight.core.cores import cores
from firstsight.core.errors import UserError
from firstsight.core.launchers import SIDE_BY_SIDE

# Stages that measure time, which nothing may disturb, and the one that waits for them.
ALONE = ("evaluate", "report")
_DVC = (sys.executable, "-m", "dvc")


def repro(jobs: int) -> None:
    """Run what is out of date, up to `jobs` stages at a time. This process ends as `dvc repro`, and does not return.

    Stages that measure time, and those that read what these write, are left to that `dvc repro`: they run one after the
    other when all others have ended. Of those that run side by side, each has as many cores as the others, if there are
    enough and the system can bind processes to them. What it prints comes with its name before each line.

    Raises:
        UserError: a stage failed. No other was begun then, and those beside it have run to their ends.
    """
    if jobs > 1 and (changed := json.loads(_printed("status", "--json"))):
        dependencies = _dependencies()
        _run_side_by_side(_out_of_date(dependencies, changed), _waiting(dependencies), jobs)
    # In place of this process, so that signals do what they do to DVC.
    sys.stdout.flush()
    os.execv(sys.executable, [*_DVC, "repro"])


def _printed(*words: str) -> str:
    """Return what a command of DVC prints. Raises UserError where it fails; DVC has said why."""
    done = subprocess.run([*_DVC, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"dvc {' '.join(words)}: expected it to succeed, found status {done.returncode}; see above")
    return done.stdout


def _dependencies() -> dict[str, set[str]]:
    """Return, for each stage, the stages whose outputs it reads."""
    graph = _printed("dag", "--dot")
    dependencies: dict[str, set[str]] = {name: set() for name in re.findall(r'^"([^"]+)";$', graph, re.MULTILINE)}
    for before, after in re.findall(r'^"([^"]+)" -> "([^"]+)";$', graph, re.MULTILINE):
        dependencies[after].add(before)
    return dependencies


def _out_of_date(dependencies: Mapping[str, set[str]], changed: Mapping[str, object]) -> dict[str, set[str]]:
    """Return those stages that may run side by side and have changed, or that read what such stages write."""
    found: dict[str, set[str]] = {}
    later: set[str] = set()
    for name in TopologicalSorter(dependencies).static_order():
        before = dependencies[name] & found.keys()
        if name.split("@")[0] in ALONE or dependencies[name] & later:
            later.add(name)
        elif before or name in changed:
            found[name] = before
    return found


def _run_side_by_side(dependencies: Mapping[str, set[str]], waiting: Mapping[str, int], jobs: int) -> None:
    """Run all these stages, each when those that it depends on have ended, and first those that most wait for."""
    if not dependencies:
        return
    sorter = TopologicalSorter(dependencies)
    sorter.prepare()
    ready: list[str] = []
    failed: list[str] = []
    running: dict[Future[int], str] = {}
    with _Workers(jobs, max(map(len, dependencies))) as workers:
        while sorter.is_active() and (running or not failed):
            ready += sorter.get_ready()
            ready.sort(key=lambda name: waiting[name])
            while ready and len(running) < jobs and not failed:
                name = ready.pop()
                running[workers.submit(name)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                if future.result():
                    failed.append(name)
                else:
                    sorter.done(name)
    if failed:
        raise UserError(f"{' and '.join(failed)}: expected it to run to its end, found it failed, as it says above")


def _waiting(dependencies: Mapping[str, set[str]]) -> dict[str, int]:
    """Return how many stages wait for each stage, through others too."""
    waiting = dict.fromkeys(dependencies, 0)
    above: dict[str, set[str]] = {}
    for name in TopologicalSorter(dependencies).static_order():
        above[name] = dependencies[name].union(*(above[one] for one in dependencies[name]))
        for one in above[name]:
            waiting[one] += 1
    return waiting


class _Workers:
    """Run stages in processes, and show what they print, until the block ends; it ends when the processes have.

    A block that is left because this process was told to end (SIGTERM) tells its processes too. An interrupt from the
    keyboard reaches them by itself, and where this process is killed, stages notice (`core.launchers`).
    """

    def __init__(self, count: int, width: int):
        self._width = width
        self._processes: set[subprocess.Popen] = set()
        self._ending = False
        self._shares: SimpleQueue[set[int]] = SimpleQueue()
        for share in _shares(count):
            self._shares.put(share)
        self._threads = ThreadPoolExecutor(count, initializer=self._bind)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is SystemExit:
            self._ending = True
            for process in list(self._processes):
                process.terminate()
        self._threads.shutdown()

    def submit(self, stage: str) -> Future[int]:
        """Begin a stage. The future has the exit status of its DVC."""
        return self._threads.submit(self._run, stage)

    def _bind(self) -> None:
        """Bind this thread, and so the processes that it starts, to cores of their own."""
        if share := self._shares.get():
            os.sched_setaffinity(0, share)

    def _run(self, stage: str) -> int:
        words = [*_DVC, "--wait-for-lock", "repro", "--single-item", stage]
        options = {"text": True, "encoding": "utf-8", "errors": "replace", "env": os.environ | {SIDE_BY_SIDE: "1"}}
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
            self._processes.add(process)
            if self._ending:  # set while the process was being started
                process.terminate()
            for line in process.stdout or ():
                sys.stdout.write(f"{stage:{self._width}} | {line}")
                sys.stdout.flush()
        self._processes.remove(process)
        return process.returncode


def _shares(count: int) -> list[set[int]]:
    """Return `count` sets of cores, equally large and without a core in common; empty where processes are not bound."""
    if not hasattr(os, "sched_getaffinity") or cores() < count:
        return [set()] * count
    usable = sorted(os.sched_getaffinity(0))
    # In a container that may use the time of a few cores, of many that it sees, others should not take the same ones.
    first, size = os.getpid() % len(usable), cores() // count
    rotated = usable[first:] + usable[:first]
    return [set(rotated[number * size : (number + 1) * size]) for number in range(count)]

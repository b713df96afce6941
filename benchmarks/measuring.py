"""Shared by benchmarks: memory of other processes, cases in their own process, CSV files with the environment."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from firstsight.core.cores import cores


def environment(device: str) -> dict[str, Any]:
    """Return the columns that say on which hardware, with which versions and when a row was measured."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {cores()} cores"
    return {
        "device": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    """Return the processor's name, or the architecture where Linux gives no name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows, all with the same columns, to benchmarks/{name}.csv."""
    with (Path(__file__).parent / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def process_tree(words: list[str], folder: Path, variables: dict[str, str]) -> tuple[float, int]:
    """Run a command in a folder, with `variables` added to the environment.

    Returns its seconds, and the peak in bytes of the summed proportional set sizes of the process and its descendants,
    which count shared pages once.

    Raises:
        RuntimeError: the command fails.
    """
    started, most = time.perf_counter(), 0
    process = psutil.Popen(words, cwd=folder, env=os.environ | variables, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, sum(map(_proportional, [process, *_descendants(process)])))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed with status {process.returncode}")
    return time.perf_counter() - started, most


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _proportional(process: psutil.Process) -> int:
    """Return the proportional set size in bytes, or 0 for a process that has exited."""
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just exited
        return 0


def lines(module: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """Run `python -m benchmarks.{module}` with these arguments; yield each line of its output, decoded from JSON.

    Raises:
        subprocess.CalledProcessError: it fails, after the lines that it has printed.
    """
    words = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)


def alone(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m benchmarks.{module}` with these arguments; return its last line of output, decoded from JSON."""
    words = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

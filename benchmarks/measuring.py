"""What benchmarks share: memory of other processes, cases in processes of their own, and CSV files that say where they
were made."""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from firstsight.core.cores import cores


def environment(device: str) -> dict[str, Any]:
    """Columns that say where and with what a row was measured."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {cores()} cores"
    return {
        "device": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    """Its name, where Linux knows one; not of every architecture."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Rows, all with the same columns, as benchmarks/{name}.csv."""
    with (Path(__file__).parent / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def process_tree(words: list[str], folder: Path, variables: dict[str, str]) -> tuple[float, int]:
    """Run a command in a folder, with these variables of the environment beside others.

    Returns its seconds, and the highest sum in bytes, over the process and all below it, of proportional set sizes:
    what they share is counted once.
    """
    started, most = time.perf_counter(), 0
    process = psutil.Popen(words, cwd=folder, env=os.environ | variables, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, sum(map(_proportional, [process, *_below(process)])))
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - started, most


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended
        return 0


def alone(module: str, *arguments: str) -> dict[str, Any]:
    """What `python -m benchmarks.{module}` with these arguments prints, as JSON: a case in a process of its own."""
    words = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])

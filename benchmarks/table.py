"""What every benchmark writes: its rows, with what they were measured on."""

import csv
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers


def environment(device: str) -> dict[str, Any]:
    """Columns that say where and with what a row was measured."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        models = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        hardware = f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {
        "device": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
    }


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Rows, all with the same columns, as benchmarks/{name}.csv."""
    with (Path(__file__).parent / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

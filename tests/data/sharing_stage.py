"""A stage for tests of several nodes: its processes share numbers, and the main one keeps what is known of them.

    python -m stages.share

It starts itself, resumes and is told to end as the stages are that compute in several processes.
"""

import json
import os
import time
from pathlib import Path

from ruamel.yaml import YAML

from firstsight.core.files import write_json
from firstsight.core.processes import collected, from_main, is_main_process, share, shared, use_all_gpus
from firstsight.core.scratch import kept_folder
from firstsight.core.stage import main
from firstsight.models.device import pick_device


def run() -> None:
    use_all_gpus("cpu")
    pick_device("cpu")
    to = YAML(typ="safe").load(Path("params.yaml"))["share"]["to"]
    with shared(kept_folder("share", {"to": to})) as kept:
        path = kept / "done.json"
        done = from_main(json.loads(path.read_text()) if is_main_process() and path.exists() else [])
        start = os.environ.get("SLURM_RESTART_COUNT", "0")
        numbers = range(len(done), to)
        for number, node in collected((work(number) for number in share(numbers)), len(numbers)):
            done.append([number, node, start])
            write_json(path, done)
        if is_main_process():
            write_json(Path("shared.json"), done)


def work(number: int) -> tuple[int, str]:
    """Take a while over a number, on a node."""
    node = os.environ["SLURMD_NODENAME"]
    time.sleep(0.1)
    with Path(f"begun-{node}").open("a") as file:
        file.write(f"{number}\n")
    return number, node


if __name__ == "__main__":
    main(run, ())

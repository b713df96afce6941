"""A stage for tests of Slurm's scripts: it counts, and keeps what every stage that trains keeps to.

    accelerate launch -m stages.count

Told to end by SIGTERM or SIGUSR1, it takes a while to save a checkpoint and exits with status 75; begun anew, it goes
on from there. Told twice, or with a data worker gone, it cannot save.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

CHECKPOINT = Path(os.environ["FIRSTSIGHT_SCRATCH"]) / "counted.json"


def main() -> None:
    settings = YAML(typ="safe").load(Path("params.yaml"))["count"]
    if settings["to"] < 0:
        sys.exit("error: expected a number to count to")
    workers = [fork_worker() for _ in range(settings["data_workers"])]
    told = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: told.append(number))
    counted = json.loads(CHECKPOINT.read_text()) if CHECKPOINT.exists() else []
    counted.append([])
    try:
        for number in range(sum(map(len, counted)), settings["to"]):
            counted[-1].append(number)
            print(f"counted {number}", flush=True)
            time.sleep(0.2)
            if told:
                time.sleep(settings["seconds_to_save"])
                alive = all(os.waitpid(worker, os.WNOHANG) == (0, 0) for worker in workers)
                if len(told) == 1 and alive:
                    CHECKPOINT.write_text(json.dumps(counted))
                sys.exit(os.EX_TEMPFAIL)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    Path("counted.json").write_text(json.dumps(counted))


def fork_worker() -> int:
    worker = os.fork()
    if not worker:
        time.sleep(600)
    return worker


if __name__ == "__main__":
    main()

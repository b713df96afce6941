"""Several processes do what one does: they train to the same weights, to rounding, and compute the same bytes."""

import json
import shutil

import pytest
import torch
from conftest import change, launch, launch_as_on_gpus, run_stage
from safetensors.torch import load_file

from firstsight.core.errors import UserError
from firstsight.core.launch import LOST, ended
from firstsight.core.params import Optimisation
from firstsight.training.fit import micro_batches


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_agree(smoke_copy, processes):
    # 33 samples: steps of 8, the last of 1, for which most processes get nothing but filling.
    change(smoke_copy, "train", batch_size=4, gradient_accumulation_steps=2, epochs=2)
    run_stage(smoke_copy, "distill")
    folder = smoke_copy / "models/student-distilled"
    alone = load_file(folder / "model.safetensors")
    history = json.loads((folder / "history.json").read_text())
    shutil.rmtree(folder)
    done = launch(smoke_copy, processes, "-m", "stages.distill")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("running on the CPU") == done.stderr.count(f"in {processes} processes") == 1
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, alone[name], atol=2e-5, rtol=1e-4)
    rows = json.loads((folder / "history.json").read_text())
    assert [row.keys() for row in rows] == [row.keys() for row in history]
    for row, expected in zip(rows, history, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    leftovers = [*(smoke_copy / "models").glob(".*"), *(smoke_copy / ".scratch").iterdir()]
    assert leftovers == []


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (8, 4, 2, (8, 2)), (8, 1, 4, (2, 1)), (6, 3, 2, (3, 3)), (2, 8, 8, (2, 1)), (1, 16, 4, (1, 4))],
)
def test_a_step_is_shared_out_evenly(settings, batch_size, accumulation, processes, expected):
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    shares = Optimisation(**values | {"batch_size": batch_size, "gradient_accumulation_steps": accumulation})
    assert micro_batches(shares, processes) == expected


def test_a_step_that_cannot_be_shared_is_refused(settings):
    values = {name: getattr(settings.train, name) for name in Optimisation.model_fields}
    with pytest.raises(UserError, match=r"a multiple of the 3 processes, found 4 x 2"):
        micro_batches(Optimisation(**values | {"batch_size": 4, "gradient_accumulation_steps": 2}), 3)


# A program that several processes run, after which it does what is to be tested: they know their `rank`.
PROGRAM = """
import os, signal, sys, time
from firstsight.core.errors import Unfinished, UserError
from firstsight.core.processes import *
from firstsight.core.stage import main

def run():
    from accelerate import PartialState
    PartialState(cpu=True)
    rank = int(os.environ["RANK"])
    {body}

main(run)
"""


def run_program(folder, processes, body):
    (folder / "program.py").write_text(PROGRAM.format(body=body.strip().replace("\n", "\n    ")))
    return launch_as_on_gpus(folder, processes, "program.py")


@pytest.mark.system
def test_results_come_in_order_to_the_main_process(tmp_path):
    body = """
for total in (0, 1, 5, 24, 27, 50):
    made = (number * number for number in share(range(total)))
    came = list(collected(made, total))
    assert came == ([number * number for number in range(total)] if rank == 0 else []), came
assert from_main(rank) == 0
print("all the same")
"""
    done = run_program(tmp_path, 3, body)
    assert (done.returncode, done.stdout) == (0, "all the same\n" * 3), done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        # In one process, while the others wait for it.
        ("if rank == 1: raise UserError('no room')\nwait_for_all()", 1, "error: no room"),
        # In all of them, at different times.
        ("time.sleep(rank / 4)\nraise UserError('no room')", 1, "error: no room"),
        ("if rank == 0: raise Unfinished('stopped')\nwait_for_all()", 75, "unfinished: stopped"),
        ("if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwait_for_all()", 137, "error: process 1: expected it to "
         "run to the end, found it killed by SIGKILL (out of memory?); run the stage again, which continues from what "
         "it has saved"),
    ],
    ids=["one", "all", "unfinished", "killed"],
)  # fmt: skip
def test_a_process_that_fails_ends_all_with_one_line(tmp_path, body, status, said):
    done = run_program(tmp_path, 2, body)
    assert (done.returncode, done.stderr.splitlines()) == (status, [said])


def test_a_launcher_says_what_its_processes_could_not(capsys):
    assert ended({0: 1, 1: LOST}) == 1
    assert ended({1: 1, 0: -9}) == 1  # one that hung was ended by the launcher
    assert capsys.readouterr().err == ""
    assert ended({0: LOST, 1: LOST}) == LOST
    assert "other processes: expected them to run to the end, found them gone" in capsys.readouterr().err
    assert ended({0: LOST, 1: -9}) == 137
    assert "process 1: expected it to run to the end, found it killed by SIGKILL" in capsys.readouterr().err

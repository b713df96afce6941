"""Several processes do what one does: they train to the same weights, to rounding, and compute the same bytes."""

import json
import re
import shutil

import pytest
import torch
from conftest import change, launch, launch_as_on_gpus, one_core, run_stage
from safetensors.torch import load_file

from firstsight.core.errors import UserError
from firstsight.core.files import fingerprint_files
from firstsight.core.launch import LOST, ended
from firstsight.core.params import Optimisation
from firstsight.training.fit import micro_batches

# Distill as on a GPU, where passes are replayed; without one, they are computed again instead.
REPLAYED = """
from firstsight.core.stage import main
from firstsight.training import cuda_graphs, fit
from stages import distill

cuda_graphs.GraphedLanguageModel._record_work = lambda self, work: (work(), work)[1]
fit._replays = lambda trainer: True
main(distill.run)
"""


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(("processes", "replayed"), [(2, False), (4, False), (2, True)])
def test_processes_agree(smoke_copy, processes, replayed):
    # 33 samples: steps of 8, the last of 1, for which most processes get nothing but filling.
    change(smoke_copy, "train", batch_size=4, gradient_accumulation_steps=2, epochs=2)
    run_stage(smoke_copy, "distill")
    folder = smoke_copy / "models/student-distilled"
    alone = load_file(folder / "model.safetensors")
    history = json.loads((folder / "history.json").read_text())
    shutil.rmtree(folder)
    (smoke_copy / "program.py").write_text(REPLAYED)
    done = launch(smoke_copy, processes, *(["program.py"] if replayed else ["-m", "stages.distill"]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("replayed as CUDA graphs") == replayed
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
sys.stdout.write("all the same\\n")  # at once, where print would write the end of the line by itself
"""
    done = run_program(tmp_path, 3, body)
    assert (done.returncode, done.stdout) == (0, "all the same\n" * 3), done.stderr


@pytest.mark.system
def test_processes_start_from_the_same_weights_and_keep_no_room_for_their_gradients(tmp_path):
    body = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from firstsight.training.averaging import prepare_for_averaging
torch.manual_seed(rank)
model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "norm": nn.LayerNorm(4, bias=False), "head": nn.Linear(4, 9)})
model["head"].weight = model["embed"].weight  # tied
prepare_for_averaging(model)
sums = [None, None]
torch.distributed.all_gather_object(sums, [float(one.sum()) for one in model.parameters()])
assert sums[0] == sums[1] != [0, 4, 0]
parameters, _ = DistributedDataParallel(model)._build_params_for_reducer()
assert [one.shape for one in parameters] == [(4,)]
"""
    done = run_program(tmp_path, 2, body)
    assert done.returncode == 0, done.stderr


@pytest.mark.system
def test_gradients_are_averaged_where_some_processes_lack_them(tmp_path):
    body = """
import torch
from firstsight.training import averaging
averaging._BUCKET = 20
ones = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in (
    (3, torch.float32), ((2, 2), torch.float32), (1, torch.bfloat16), (9, torch.float32), (2, torch.float32))]
ones[0].grad = torch.full((3,), 1.0 + rank)
if rank == 1: ones[1].grad = torch.tensor([[2.0, 4.0], [6.0, 8.0]])
ones[2].grad = torch.full((1,), 3.0, dtype=torch.bfloat16)
kept = ones[3].grad = torch.full((9,), 2.0 * rank)
frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
averaging.average_gradients([frozen, *ones])
assert ones[0].grad.tolist() == [1.5] * 3
assert ones[1].grad.tolist() == [[1, 2], [3, 4]]
assert (ones[2].grad.tolist(), ones[2].grad.dtype) == ([3], torch.bfloat16)
assert ones[3].grad is kept and kept.tolist() == [1] * 9  # where a graph adds to it
assert ones[4].grad is None and frozen.grad is None
"""
    done = run_program(tmp_path, 2, body)
    assert done.returncode == 0, done.stderr


@pytest.mark.system
@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        # In one process that the others have not met: they wait for it until the launcher kills them.
        ("if rank == 1: raise UserError('no room')\nwait_for_all()", 1, "error: no room"),
        # In all of them, at different times.
        ("time.sleep(rank / 4)\nraise UserError('no room')", 1, "error: no room"),
        # In one that the others have met, and learn at once that it has gone.
        ("wait_for_all()\nif rank == 0: raise Unfinished('stopped')\nwait_for_all()", 75, "unfinished: stopped"),
        ("wait_for_all()\nif rank == 1: os.kill(os.getpid(), signal.SIGKILL)\nwait_for_all()", 137,
         "error: process 1: expected it to run to the end, found it killed by SIGKILL (out of memory?); run the stage "
         "again, which continues from what it has saved"),
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


@pytest.fixture
def shared_work(smoke_copy):
    """Half of the questions are answered by the teacher; 9 batches of the train split, the last of one sample."""
    change(smoke_copy, "data", unanswered="teacher", labelled_fraction=0.5)
    change(smoke_copy, "train", train_vision=False)
    change(smoke_copy, "targets", batch_size=4)
    change(smoke_copy, "evaluate", batch_size=8)
    run_stage(smoke_copy, "build_egoqa_dataset")
    return smoke_copy


def contents(folder):
    """The outputs of the stages that share their work, without timings."""
    outputs = ("data/teacher-targets", "data/visual-tokens", "evaluations/student")
    files = [path for output in outputs for path in (folder / output).iterdir() if path.name != "performance.json"]
    return {str(path.relative_to(folder)): fingerprint_files([path]) for path in files}


def computed_by_one(folder):
    with one_core():
        run_stage(folder, "cache_teacher_targets")
        run_stage(folder, "cache_visual_tokens")
        run_stage(folder, "evaluate", "student")
    return contents(folder)


# The stages that share their work, of which this process is killed in one after some of its batches.
STAGES = """
import os, signal, sys
from firstsight.core import processes, scratch
from firstsight.core.stage import main
from firstsight.caching import shards
from stages import cache_teacher_targets, cache_visual_tokens, evaluate

share, rank, (victim, after) = processes.share, int(os.environ["RANK"]), map(int, sys.argv[2:4])

def until_killed(items):
    for number, item in enumerate(share(items)):
        if (rank, number) == (victim, after):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

if victim >= 0:
    processes._TOGETHER = 1  # batches are handed over one by one,
    shards._SHARD_RECORDS = 1  # and every one is kept
    shards.share = evaluate.share = until_killed
    scratch._code = dict

def run():
    if "c" in sys.argv[1]:
        cache_teacher_targets.run()
    if "v" in sys.argv[1]:
        cache_visual_tokens.run()
    if "e" in sys.argv[1]:
        evaluate.run("student")

main(run)
"""


def computed_by(folder, processes, stages="cve", victim=-1, after=0):
    (folder / "program.py").write_text(STAGES)
    with one_core():
        return launch_as_on_gpus(folder, processes, "program.py", stages, str(victim), str(after))


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(("kind", "processes"), [("hidden", 2), ("hidden", 4), ("topk", 2)])
def test_what_several_processes_compute_is_what_one_does(shared_work, kind, processes):
    change(shared_work, "targets", kind=kind)
    expected = computed_by_one(shared_work)
    done = computed_by(shared_work, processes)
    assert done.returncode == 0, done.stderr
    assert contents(shared_work) == expected
    for line in (
        "the teacher answered",
        "wrote data/teacher-targets",
        "wrote data/visual-tokens",
        "student: exact match",
    ):
        assert done.stderr.count(line) == 1, done.stderr
    assert list((shared_work / ".scratch").iterdir()) == []


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.parametrize(("stage", "victim", "after", "resumed"), [
    ("c", 1, 1, r"answers: resuming after [1-9]\d* of"), ("e", 0, 2, r"resuming at question [1-9]\d* of 48"),
])  # fmt: skip
def test_what_a_killed_process_leaves_is_of_use_to_another_number(
    shared_work, monkeypatch, caplog, stage, victim, after, resumed
):
    expected = computed_by_one(shared_work)
    done = computed_by(shared_work, 2, stage, victim, after)
    assert done.returncode == 137, done.stderr
    assert [line for line in done.stderr.splitlines() if "rror" in line] == [
        f"error: process {victim}: expected it to run to the end, found it killed by SIGKILL (out of memory?); run the "
        "stage again, which continues from what it has saved"
    ]
    assert contents(shared_work) == expected  # as it was
    monkeypatch.setattr("firstsight.core.scratch._code", dict)  # this process has loaded more of it
    with caplog.at_level("INFO", logger="firstsight"):
        assert computed_by_one(shared_work) == expected
    assert re.search(resumed, caplog.text)
    assert list((shared_work / ".scratch").iterdir()) == []


# A stage that notes when models are loaded and measured, on a machine that has six cores.
NOTED = """
import os, time
import torch
from firstsight.core import processes
from firstsight.core.stage import main
from firstsight.models import device, loading
from firstsight.profiling import cost
from stages import evaluate

def noted(name, work):
    def doing(*given, **named):
        with open("noted-" + os.environ["RANK"], "a") as file:
            print(name, time.monotonic(), torch.get_num_threads(), file=file)
            done = work(*given, **named)
            print("after", name, time.monotonic(), file=file)
        return done
    return doing

device.cores = processes.cores = lambda: 6
loading.load_model = noted("loading", loading.load_model)
cost.measure_throughput = noted("measuring", cost.measure_throughput)
main(lambda: evaluate.run("student"))
"""


@pytest.mark.slow
@pytest.mark.system
def test_one_process_measures_with_all_cores_while_the_others_wait(smoke_copy):
    (smoke_copy / "noted.py").write_text(NOTED)
    with one_core():
        done = launch_as_on_gpus(smoke_copy, 2, "noted.py")
    assert done.returncode == 0, done.stderr
    assert "running on the CPU, 3 threads, in 2 processes" in done.stderr
    first, second = ((smoke_copy / f"noted-{rank}").read_text().splitlines() for rank in (0, 1))
    assert [line.rsplit(" ", 2)[::2] for line in first if "after" not in line] == [["loading", "6"], ["measuring", "6"]]
    (loaded,) = (line.split() for line in second if "after" not in line)
    assert loaded[0] == "loading"
    assert float(loaded[1]) > float(first[-1].split()[-1])
    performance = json.loads((smoke_copy / "evaluations/student/performance.json").read_text())
    assert performance["device"].endswith("6 threads")

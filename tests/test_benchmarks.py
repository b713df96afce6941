"""Benchmarks compare what computes the same, and start with nothing installed but what they measure."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, suppress

import numpy as np
import psutil
import pytest
from conftest import ROOT, warm
from warm import PYTHON

from benchmarks import card, device, loss, pays
from firstsight.core import params
from firstsight.records.parquet import Split

# What a machine for benchmarks need not have: libraries of readers, reports, quantization and the pipeline.
ABSENT = (
    *("av", "onnx", "onnxruntime", "datasets", "bitsandbytes", "rouge_score", "sacrebleu"),
    *("dvc", "matplotlib", "pandas", "tabulate", "typer", "gradio", "liger_kernel", "trl"),
)
# As sitecustomize.py in a folder of PYTHONPATH, Python runs it in every process: these libraries are not found.
HIDE = f"""import sys
from importlib.machinery import PathFinder

class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Installed
"""
# Each benchmark at a tiny scale, printing its rows instead of writing them. Cases of the first two share one process,
# in which only the first one's peak can be measured.
LOSS = """
from benchmarks import loss
loss.STUDENT, loss.TEACHER, loss.SHARED, loss.TOKENS = (311, 24), (337, 40), 307, {"cpu": (9,)}
loss.lines = lambda module, name, device: [loss.measure(name, 9, device) | {"bytes": 1}]
loss.write = lambda name, rows: print(json.dumps({name: rows}))
loss.run()
"""
DISTILL_STEP = """
from benchmarks import distill_step
for sizes in (distill_step.QWEN2_VL_7B, distill_step.QWEN2_VL_2B):
    sizes |= {"num_hidden_layers": 1, "vocab_size": 8192}
distill_step.SHARED = 5120
distill_step.SCALE["cpu"], distill_step.STEPS["cpu"] = (8, 56), 1
case = distill_step.Case
distill_step.CASES["cpu"] = tuple(
    case(student, teacher, seen, body, samples=1)
    for student, teacher, seen, body in (
        ("full", "cached", "computed", "transformers"), ("full", "online, float32", "computed", "transformers"),
        ("full", "online, int8", "computed", "transformers"), ("full", "cached", "computed", "liger"),
        ("frozen", "cached", "cached", "transformers"), ("lora", "cached", "cached", "compiled"),
    )
)
distill_step.alone = lambda module, one, device: distill_step.measure(case(**json.loads(one)), device) | {"bytes": 1}
distill_step.write = lambda name, rows: print(json.dumps({name: rows}))
distill_step.run()
"""
ANSWERING = """
from pathlib import Path
from benchmarks import answering
for sizes in answering.SIZES.values():
    sizes |= {"num_hidden_layers": 1, "vocab_size": 8192}
answering.SHARED = 8192
answering.SCALE["cpu"], answering.TOKENS["cpu"] = (8, 56), 3
answering.alone = lambda module, folder, *arguments: answering.measure(Path(folder), *arguments)
answering.write = lambda name, rows: print(json.dumps({name: rows}))
answering.run()
"""
ATTENTION = """
from benchmarks import attention
attention.SHAPES, attention.REPEATS = [(2, 280, 1), (1, 300, 3)], 1
attention.write = lambda name, rows: print(json.dumps({name: rows}))
sys.argv[1:] = ["8"]
attention.run()
"""
TRUE_SIZE = """
from pathlib import Path
from benchmarks import true_size
true_size.QWEN2_VL_7B["num_hidden_layers"] = true_size.QWEN2_VL_2B["num_hidden_layers"] = 1
true_size.VIDEO["cpu"], true_size.STEPS = (2, 56), 1
true_size.write = lambda name, rows: print(json.dumps({name: rows}))
sys.argv[1:] = ["presets/smoke.yaml"]
true_size.run()
"""


def test_the_losses_side_by_side_agree(monkeypatch):
    monkeypatch.setattr(loss, "STUDENT", (311, 24))
    monkeypatch.setattr(loss, "TEACHER", (337, 40))
    monkeypatch.setattr(loss, "SHARED", 307)
    assert list(loss.implementations("cpu")) == ["plain PyTorch", "FirstSight", "Liger, chunked"]
    measured = {name: loss.measure(name, 9, "cpu") for name in loss.implementations("cpu")}
    assert measured["FirstSight"]["loss"] == pytest.approx(measured["plain PyTorch"]["loss"], rel=1e-5)
    for found in measured.values():
        assert 0 < found["hidden_error"] < 1e-5
        assert 0 < found["head_error"] < 1e-5


def test_a_case_that_fails_leaves_those_before_it(monkeypatch, tmp_path, caplog):
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        'echo \'{"tokens": 64, "seconds": 2, "bytes": 8e6, "loss": 3, "hidden_error": 1e-3, "head_error": 2e-3}\'\n'
        'test "$3" = FirstSight\n'
    )
    script.chmod(0o700)
    written = []
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(sys, "argv", ["loss"])
    monkeypatch.setattr(loss, "write", lambda name, rows: written.append([row["implementation"] for row in rows]))
    loss.run()
    names = ["plain PyTorch", "FirstSight", "Liger, chunked"]
    assert written == [names[:1], names[:2], names]
    lines = [message for message in caplog.messages if "left out" in message]
    assert [line.split(":")[0] for line in lines] == ["plain PyTorch", "Liger, chunked"]
    assert "left out above 64 tokens" in lines[0]


def test_what_there_is_no_time_for_is_ended_with_its_processes_and_left_out(monkeypatch, tmp_path, caplog):
    script, seen = tmp_path / "python", tmp_path / "seen"
    script.write_text(
        f'#!/bin/sh\necho "$2" >> {seen}\ntest "$2" != benchmarks.slow && exit 3\nsleep 60 & echo $! >> {seen}; wait\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(sys, "argv", ["card", "0.03"])
    shares = card.PARTS
    # What the second has is over before the third begins, and the last has less than none.
    monkeypatch.setattr(card, "PARTS", {"broken": 0.1, "slow": 0.5, "after": 0.4, "late": -0.4})
    card.run()
    broken, slow, sleeper, after = seen.read_text().split()
    assert (broken, slow, after) == ("benchmarks.broken", "benchmarks.slow", "benchmarks.after")
    # It has been killed, which takes a moment, and may stay as a zombie where nobody waits for orphans.
    with suppress(psutil.NoSuchProcess):
        ended = psutil.Process(int(sleeper))
        for _ in range(100):
            if ended.status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.1)
        assert ended.status() == psutil.STATUS_ZOMBIE
    assert [message.split(" after")[0] for message in caplog.messages] == [
        "benchmarks.broken: failed with status 3",
        "benchmarks.slow: ended, because the time is over,",
        "benchmarks.after: failed with status 3",
        "benchmarks.late: left out, because the time is over",
    ]
    assert math.isclose(sum(shares.values()), 1)


@pytest.mark.system
@pytest.mark.parametrize(
    ("script", "column", "measured"),
    [
        (LOSS, "implementation", {"plain PyTorch", "FirstSight", "FirstSight, PyTorch"}),
        (DISTILL_STEP, "teacher", {"cached", "online, float32"}),
        (ANSWERING, "model", {"2B", "7B"}),
        (ATTENTION, "masked_tokens", {0, 164, 320, 420}),
        (TRUE_SIZE, "stage", {"cache-teacher-targets", "cache-visual-tokens", "distill", "finetune-student"}),
    ],
    ids=["loss", "distill_step", "answering", "attention", "true_size"],
)
def test_a_benchmark_imports_only_what_it_measures(script, column, measured, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    variables = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    # The loss's kernel, which is for GPUs, runs in Triton's interpreter.
    variables |= {"TRITON_INTERPRET": "1"} if script is LOSS else {}
    words = [sys.executable, "-c", f"import json, sys\n{script}"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | variables | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, rows),) = json.loads(done.stdout.splitlines()[-1]).items()
    assert {row[column] for row in rows} == measured
    assert all(float(row.get("seconds", row.get("token_ms"))) > 0 for row in rows)
    assert all(float(row.get("difference", 0)) < 1e-6 for row in rows)
    # Its reference is not among the cases, and no other step may stand for it.
    without = {row["body"] for row in rows if row.get("time_ratio", 1) is None}
    assert without == ({"compiled"} if script is DISTILL_STEP else set())


# Qwen2-VL-2B has 32 layers in its vision tower too, whose graphs take minutes to trace.
FEW_LAYERS = """
def config(*sizes, whole=device.config):
    made = whole(*sizes)
    made.vision_config.depth = 2
    return made

device.config = config
"""
# By module: its arguments, how it is scaled down, and the rows that it writes.
SMALL = {
    "pays": (
        ["0"],
        "SHARES, NOISES, TEMPERATURES, ALPHAS, show = (0.5, 1.0), (0.4,), (2.0,), (1.0,), lambda rows: None\n"
        "RESULTS = RESULTS.with_name('none.csv')",
        14,
    ),
    "build": ([], "PICTURES = (4, 16)", 2),
    "device": (
        ["8", "onnxruntime", "openvino"],
        f"from benchmarks import device\n{FEW_LAYERS}QWEN2_VL_2B = QWEN2_VL_2B | {{'num_hidden_layers': 2}}",
        8,
    ),
    "exported": (["0.2"], "TIMED = REPEATS = LOGITS = 2", 4),
    # Of graphs that have few bits already: the smoke preset asks for no others.
    "export_weights": (["0.2"], "FLOAT, BLOCKS = VARIANTS['student-onnx-w4a8'].model, ()", 3),
    "export_rounding": (
        ["0.2"],
        f"from benchmarks import device\n{FEW_LAYERS}"
        "device.QWEN2_VL_2B = device.QWEN2_VL_2B | {'num_hidden_layers': 1}\n"
        "STUDENT = Path(tempfile.mkdtemp())\n"
        "export_folders(VARIANTS['student-distilled'].model, {'float32': STUDENT}, [])",
        10,
    ),
    "processes": (["0.2"], "PROCESSES = (1, 2)", 2),
    "repeat": (["student-nf4"], "FIGURES = FIGURES[:2]", 3),
    "settings": (["student-nf4"], "SETTINGS = {name: SETTINGS[name] for name in list(SETTINGS)[::5]}", 2),
    "sweep": (["0.2"], "POINTS = POINTS[:1]", 4),
    "look_once": (["30"], "POINTS = POINTS[:1]", 3),
    "padding": (["2"], "MICRO_BATCHES, FILE = (4, 16), FILE.with_name('none.csv')", 6),
}
# Those that measure the time and memory of processes from their start, or what a start-up file does to them.
WHOLE_PROCESSES = {"build", "device", "exported", "processes", "settings"}


@pytest.fixture
def after_repro(smoke, tmp_path):
    """A folder as benchmarks find it after `dvc repro`: the repository's files, and what the smoke run has left."""
    for name in ("benchmarks", "firstsight", "presets", "stages", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("data", "evaluations", "params.yaml"):
        (tmp_path / name).symlink_to(smoke / name)
    # As DVC makes them of its cache.
    shutil.copytree(smoke / "models", tmp_path / "models", copy_function=os.link)
    return tmp_path


@pytest.fixture
def rows_of(after_repro):
    def run(module: str) -> list[dict]:
        arguments, scaled, _ = SMALL[module]
        script = [
            "import json, sys",
            f"from benchmarks import {module} as benchmark",
            f"sys.argv[1:] = {arguments}",
            f"exec({scaled!r}, vars(benchmark))",
            "benchmark.write = lambda name, rows: print(json.dumps(rows))",
            "benchmark.run()",
        ]
        (after_repro / "script.py").write_text("\n".join(script))
        started = {} if module in WHOLE_PROCESSES else warm()
        environment = os.environ | started | {"PYTHONPATH": str(after_repro), "CUDA_VISIBLE_DEVICES": ""}
        words = [started.get(PYTHON, sys.executable), "script.py"]
        done = subprocess.run(words, cwd=after_repro, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.splitlines()[-1])
        assert len(rows) == SMALL[module][2]
        return rows

    return run


@pytest.mark.system
def test_each_student_of_the_study_learns_from_what_its_row_says(rows_of):
    rows = rows_of("pays")
    learnt = [
        (row["share"], row["noise"], row["occluded"], row["learns_from"], row["temperature"], row["alpha"])
        for row in rows
    ]
    labels, answers, distributions = "labels", "teacher's answers", "teacher's distributions"
    assert learnt == [
        (1.0, 0.0, 0.0, "the teacher itself", None, None),
        (1.0, 0.0, 0.0, "the student before", None, None),
        (1.0, 0.0, 0.0, labels, None, None),
        (1.0, 0.0, 0.0, distributions, 3.0, 0.7),
        (0.5, 0.0, 0.0, labels, None, None),
        (0.5, 0.0, 0.0, answers, None, None),
        (0.5, 0.0, 0.0, distributions, 3.0, 0.7),
        (1.0, 0.0, 0.0, distributions, 2.0, 1.0),
        (1.0, 0.4, 0.0, labels, None, None),
        (1.0, 0.4, 0.0, distributions, 3.0, 0.7),
        (1.0, 0.0, 1.0, "the teacher itself", None, None),
        (1.0, 0.0, 1.0, "the student before", None, None),
        (1.0, 0.0, 1.0, labels, None, None),
        (1.0, 0.0, 1.0, distributions, 3.0, 0.7),
    ]
    assert [row["steps"] > 0 for row in rows] == [False] * 2 + [True] * 8 + [False] * 2 + [True] * 2
    assert all(0 <= row["exact_match"] <= 1 for row in rows)


def test_the_study_shows_means_and_intervals_over_seeds(monkeypatch, tmp_path, capsys):
    settings = params.load(ROOT / "presets/smoke.yaml")
    monkeypatch.setattr(pays, "PICTURE", tmp_path / "pays.png")
    monkeypatch.setattr(pays.params, "load", lambda: settings)
    arm = {"noise": 0.0, "occluded": 0.0, "learns_from": "labels", "temperature": None, "alpha": None}
    found = {0.05: (0.5, 0.6, 0.7), 1.0: (0.9,)}
    pays.show([arm | {"seed": n, "share": s, "exact_match": m} for s, ms in found.items() for n, m in enumerate(ms)])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    # 4.303 standard errors of 0.1 / sqrt(3); one seed has no interval.
    assert shown[0] == ["5%", "0%", "0%", "labels", "0.600", "0.352", "to", "0.848", "3"]
    assert shown[1] == ["100%", "0%", "0%", "labels", "0.900", "-", "1"]
    assert (tmp_path / "pays.png").stat().st_size > 5000


def test_labels_that_are_replaced_are_answers_of_the_same_question(smoke, tmp_path):
    path = tmp_path / "train.parquet"
    shutil.copy(smoke / "data/egoqa/train.parquet", path)
    before = [record for sample in Split(path) for record in sample.records]
    pays.mislabel(path, 1.0, 0)
    after = [record for sample in Split(path) for record in sample.records]
    given = {(record.question, record.options, record.answer) for record in before}
    changed = sum(one.answer != other.answer for one, other in zip(before, after, strict=True))
    assert 0 < changed < len(before)
    assert all((record.question, record.options, record.answer) in given for record in after)
    assert [record.id for record in after] == [record.id for record in before]


def test_a_quarter_of_the_picture_is_hidden_in_all_frames_alike(smoke, tmp_path):
    path = tmp_path / "train.parquet"
    shutil.copy(smoke / "data/egoqa/train.parquet", path)
    before = list(Split(path))
    pays.occlude(path, 1.0, 0)
    after = list(Split(path))
    assert [sample.records for sample in after] == [sample.records for sample in before]
    grey = [[abs(np.asarray(image).astype(int) - 128).max(-1) <= 16 for image in sample.images()] for sample in after]
    assert all(np.all(frames, 0).mean() > 0.2 for frames in grey)
    assert np.all([frames[0] for frames in grey], 0).mean() < 0.1


@pytest.mark.system
def test_a_data_set_is_built_at_each_size(rows_of):
    assert [(row["records"], row["size_ratio"]) for row in rows_of("build")] == [(20, 1), (80, 4)]


@pytest.mark.system
def test_a_model_and_its_exports_are_measured_each_in_its_process(rows_of):
    rows = rows_of("device")
    assert [row["precision"] for row in rows] == ["bfloat16", *2 * ["int8", "w4a8"], *3 * ["float32"]]
    engines = ["PyTorch", *2 * ["onnxruntime"], *2 * ["OpenVINO"], "PyTorch", "onnxruntime", "OpenVINO"]
    assert [row["engine"].split()[0] for row in rows] == engines
    assert all(row[name] > 0 for row in rows for name in ("disk_mb", "memory_mb", "load_s", "prefill_ms", "token_ms"))
    assert rows[0]["speed_up"] == 1
    assert all(row["speed_up"] > 0 for row in rows[1:5])
    assert not any(row["speed_up"] for row in rows[5:])
    int8, w4a8, whole = *rows[1:3], rows[6]
    assert whole["same_answer"]
    assert whole["disk_mb"] > 3 * int8["disk_mb"] > 3 * w4a8["disk_mb"]
    assert float(whole["logit_difference"]) < 1e-4 < float(int8["logit_difference"]) < float(w4a8["logit_difference"])


def test_models_are_timed_in_turns_and_one_that_does_not_run_is_left_out(monkeypatch, caplog):
    started, written, turns = [], {}, []

    class Asked(nullcontext):
        def __init__(self, folder, *engine):
            super().__init__(self)
            self.case = (folder.name, *engine)
            started.append(self.case)

        def measures(self):
            if "onnxruntime-tensorrt" in self.case:
                return None
            row = {"engine": self.case[1], "precision": self.case[-1], "token_ms": 1.0, "speed_up": ""}
            return row | {"case": self.case}

        def token_ms(self):
            turns.append(self.case[0])
            slower = 1 + len(turns) // 4  # the machine is, ever more: within a turn as well
            return {"checkpoint": 60.0, "int8": 30.0, "w4a8": 20.0}[self.case[0]] * slower

        def status(self):
            return -9

    monkeypatch.setattr(device, "Asked", Asked)
    monkeypatch.setattr(device, "alone", lambda *_: {"seconds": 1, "memory_mb": 1})
    monkeypatch.setattr(device, "write_model", lambda *_: None)
    monkeypatch.setattr(device, "write", lambda name, rows: written.update({name: json.loads(json.dumps(rows))}))
    monkeypatch.setattr(sys, "argv", ["device", "1", "onnxruntime-cuda", "onnxruntime-tensorrt"])
    device.run()
    few_bits = [(weights, engine) for engine in sys.argv[2:] for weights in ("int8", "w4a8")]
    whole = [("checkpoint", "cuda", "float32"), *(("float32", engine) for engine in sys.argv[2:])]
    assert started == [("checkpoint", "cuda", "bfloat16"), *few_bits, *whole]
    assert turns == device.REPEATS * ["checkpoint", "int8", "w4a8"]
    ((name, rows),) = written.items()
    assert name == "device-cuda"
    assert [tuple(row["case"]) for row in rows] == [started[0], *few_bits[:2], *whole[:2]]
    # The turns are 60 30 20, 120 60 40, 120 90 60, 180 90 80, 240 120 80: the ratios of medians are 1.33 and 2.
    assert [(row["token_ms"], row["speed_up"]) for row in rows] == [(120, 1), (90, 2), (60, 3), (1, ""), (1, "")]
    assert "w4a8 in onnxruntime-tensorrt: left out, its process ended with status -9" in caplog.text


@pytest.mark.system
def test_ways_to_round_are_compared_on_both_models(rows_of):
    rows = rows_of("export_rounding")
    ways = ["to the nearest", "AWQ", "AWQ, balanced", "GPTQ", "GPTQ, balanced"]
    assert [row["weights"] for row in rows] == 2 * ways
    for nearest, _, _, plain, balanced in (rows[:5], rows[5:]):
        assert plain["text_error"] < balanced["text_error"] < nearest["text_error"]
        assert balanced["visual_error"] < plain["visual_error"] < nearest["visual_error"]
    assert all(0 <= row["same_answers"] <= row["questions"] and float(row["divergence"]) > 0 for row in rows[:5])
    assert all(row["divergence"] == "" for row in rows[5:])


@pytest.mark.system
def test_samples_of_like_length_need_less_padding(rows_of):
    rows = rows_of("padding")
    training, whole, targets = rows[:2], rows[2:4], rows[4:]
    for drawn, ordered in (training, targets):
        assert (drawn["order"], ordered["order"]) == ("as drawn", "longest first")
        assert 0 <= ordered["padding"] <= drawn["padding"] < 1
    assert training[1]["padding"] < training[0]["padding"]
    # A step that is one micro-batch is one in any order.
    assert len({row["padding"] for row in whole}) == 1
    assert [row["pass"] for row in rows] == ["training"] * 4 + ["targets"] * 2
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.system
def test_processes_reach_the_same_loss(rows_of):
    one, two = rows_of("processes")
    assert float(one["validation_loss"]) == pytest.approx(float(two["validation_loss"]), rel=1e-3)
    assert two["memory_mb"] > one["memory_mb"] > 100


@pytest.mark.system
def test_an_evaluation_is_compared_with_itself(rows_of):
    for row in rows_of("repeat"):
        assert row["ratio"] == pytest.approx(row["second"] / row["first"], rel=0.01)


@pytest.mark.system
def test_a_processor_that_repacks_weights_gives_the_same_answers(rows_of, smoke):
    plain, repacking = rows_of("settings")
    assert repacking["setting"] == "bitsandbytes told of AVX-512-BF16"
    assert plain["answers_that_differ"] == repacking["answers_that_differ"] == 0
    assert plain["questions"] == json.loads((smoke / "evaluations/student-nf4/quality.json").read_text())["questions"]


@pytest.mark.system
def test_a_sweep_costs_what_its_points_cost(rows_of):
    rows = rows_of("sweep")
    assert [(row["targets"], row["stage"]) for row in rows] == [
        (kind, stage) for kind in ("hidden", "online") for stage in ("cache-teacher-targets", "distill")
    ]
    assert rows[1]["validation_loss"] == rows[3]["validation_loss"]


@pytest.mark.system
def test_a_sweep_on_visual_tokens_made_once_ends_as_one_that_makes_them_in_every_epoch(rows_of):
    rows = rows_of("look_once")
    assert [(row["visual_tokens"], row["stage"]) for row in rows] == [
        ("cached", "cache-visual-tokens"), ("computed", "distill"), ("cached", "distill")
    ]  # fmt: skip
    assert float(rows[1]["validation_loss"]) == pytest.approx(float(rows[2]["validation_loss"]), rel=1e-3)
    assert all(row["cpu_seconds"] > 0 for row in rows)


def test_the_picture_is_drawn_from_the_committed_figures(tmp_path, monkeypatch):
    from benchmarks import picture

    for path in (ROOT / "benchmarks").glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(picture, "FOLDER", tmp_path)
    picture.run()
    assert (tmp_path / "distillation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.system
def test_exports_are_compared_with_what_they_were_made_from(rows_of):
    teacher, student, exported, by_openvino = rows_of("exported")
    assert (teacher["variant"], student["variant"]) == ("teacher", "student-distilled")
    assert (exported["variant"], exported["precision"]) == ("student-onnx-w4a8", "w4a8")
    assert exported["engine"].startswith("onnxruntime")
    assert by_openvino["engine"].startswith("OpenVINO")
    assert exported["same_batch_1"] <= student["same_batch_1"] == student["questions"]
    assert all(row["latency_ms"] > 0 for row in (teacher, student, exported, by_openvino))


@pytest.mark.system
def test_ways_to_store_weights_are_compared(rows_of):
    first, *others = rows_of("export_weights")
    assert (first["weights"], first["same_answers"]) == ("float32", first["questions"])
    assert all(row["same_answers"] <= row["questions"] for row in others)

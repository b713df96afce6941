"""The same work on machines that differ: in cores, in what they tell of a process, in their locale."""

import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from firstsight.core.cores import cores, share
from firstsight.training import fit

# Without /proc, as in a bare chroot.
BARE = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
FULL = [*BARE[:5], 'mount -t tmpfs -o size=4k none /dev/shm && echo > /dev/shm/full && exec "$@"', "sh"]
PROGRAM = """
import torch
from firstsight.core import stage
from firstsight.profiling.peak_memory import PeakMemory

def run():
    memory = PeakMemory("cpu")
    held = torch.ones(50_000_000)
    del held
    print(memory.peak())

stage.main(run)
"""
NAMED = """
import sys
from pathlib import Path
from firstsight.core import stage

def run():
    (Path(sys.argv[1]) / "küche 你.txt").write_text("so")
    print(sys.argv[2])

stage.main(run)
"""


def test_no_more_cores_than_a_process_is_bound_to():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_cores_where_none_can_be_bound(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert 1 <= cores() <= os.cpu_count()


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ({}, math.inf),
    ],
)
def test_what_a_container_grants(tmp_path, files, granted):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert share(tmp_path) == granted


@pytest.mark.system
def test_peak_memory_without_proc():
    if subprocess.run([*BARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DVC_STAGE": "evaluate@teacher"}
    words = [*BARE, sys.executable, "-c", PROGRAM]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert 0 <= int(ran.stdout) < 260e6  # what started the process may have held more


@pytest.mark.system
def test_names_in_any_script_whatever_the_locale(tmp_path):
    """PYTHONUTF8=0 leaves the C locale what it is: ASCII."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    (tmp_path / "program.py").write_text(NAMED, encoding="utf-8")
    (tmp_path / "made").mkdir()
    words = [sys.executable, tmp_path / "program.py", tmp_path / "made", "grüner Löffel"]
    ran = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("grüner Löffel\n", "", 0)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["küche 你.txt"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).bfloat16(),
        torch.randn(3, 4).T,
        torch.arange(5),
        torch.tensor(True),
        torch.zeros(0, 3),
    ],
    ids=["bfloat16", "transposed", "integers", "single", "empty"],
)
def test_data_workers_hand_tensors_over_as_they_are(tensor):
    back, content = fit._by_value(tensor)
    found = back(*pickle.loads(pickle.dumps(content)))
    assert torch.equal(found, tensor)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)


@pytest.mark.system
def test_full_shared_memory_is_named():
    if subprocess.run([*FULL, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    program = "from firstsight.core import faults; print(faults.in_words(OSError(28, 'No space left on device')))"
    words = [*FULL, sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("/dev/shm: expected room for what processes share, found it full; ")

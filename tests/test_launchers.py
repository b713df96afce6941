"""What launches a stage may be killed: the stage then ends too, saving what it has."""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import ROOT

from firstsight.core.processes import launcher, on_nodes

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="watches through /proc and pidfd"),
]

# A stage that says its process id and works for a minute; told to end, it takes a while to say so in a file: its
# terminal and its launcher may both tell it.
STAGE = """
import pathlib, sys, time
from firstsight.core.stage import main

def run():
    try:
        pathlib.Path("pid").write_text(str(__import__("os").getpid()))
        time.sleep(60)
    except SystemExit:
        print("saving", file=sys.stderr, flush=True)
        time.sleep(1)
        pathlib.Path("told").touch()
        raise

main(run)
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    command = f"{shlex.quote(sys.executable)} stage.py; true"  # the shell stays between
    (tmp_path / "dvc.yaml").write_text(f'stages:\n  work:\n    cmd: "{command}"\n')
    subprocess.run(["dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def start(project: Path, words: list[str], **more) -> tuple[subprocess.Popen, int]:
    """A process, and the stage that it has launched."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen(words, cwd=project, env=environment, start_new_session=True, **more)
    pid = project / "pid"
    wait_until(lambda: pid.exists() and pid.read_text())
    return launcher, int(pid.read_text())


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("deadly", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_with_dvc(project, deadly):
    dvc, stage = start(project, ["dvc", "repro"])
    dvc.send_signal(deadly)
    dvc.wait()
    wait_until(lambda: not alive(stage), 10)
    assert (project / "told").exists()


@pytest.mark.parametrize(
    "missing",
    ["del os.pidfd_open", "os.pidfd_open = lambda process: os.stat('/no')"],  # not built in; refused by the kernel
    ids=["python", "kernel"],
)
def test_a_stage_ends_with_dvc_where_the_kernel_tells_of_no_deaths(project, missing):
    (project / "stage.py").write_text(f"import os\n{missing}\n{STAGE}")
    streams = {"stderr": subprocess.PIPE, "text": True}
    dvc, stage = start(project, ["dvc", "repro"], **streams)
    dvc.kill()
    said = dvc.communicate()[1]
    wait_until(lambda: not alive(stage), 10)
    assert (project / "told").exists()
    assert "Traceback" not in said


def test_a_stage_ends_with_accelerate(project):
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "stage.py"]
    accelerate, stage = start(project, words)
    accelerate.kill()
    accelerate.wait()
    wait_until(lambda: not alive(stage), 10)
    assert (project / "told").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["dvc", "repro"], True),
        (["sh", "-c", "dvc repro 2>&1 | cat"], True),
        ([sys.executable, "stage.py"], True),
        (["nohup", sys.executable, "stage.py"], False),
    ],
    ids=["dvc", "pipe", "by-hand", "nohup"],
)
def test_a_stage_ends_with_its_terminal_unless_told_not_to(project, words, told):
    terminal, inside = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    launcher, stage = start(project, words, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **streams)
    os.close(inside)
    os.close(terminal)
    if told:
        wait_until(lambda: not alive(stage), 20)
    else:
        time.sleep(1)
        assert alive(stage)
        launcher.kill()
    launcher.wait()
    assert (project / "told").exists() == told


def test_a_stage_outlives_the_shell_it_was_typed_in(project):
    shell, stage = start(project, ["sh", "-c", f"{shlex.quote(sys.executable)} stage.py & wait"])
    shell.kill()
    shell.wait()
    time.sleep(0.5)
    assert alive(stage)
    os.kill(stage, signal.SIGTERM)
    wait_until(lambda: not alive(stage), 10)


def test_what_is_set_for_a_whole_container_is_no_launcher(project):
    """Its first process has none above it, and all below have its variables."""
    inside = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no containers can be made here")
    program = "from firstsight.core import stage; import time; stage.main(lambda: (time.sleep(0.5), print('done')))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    words = [*inside, sys.executable, "-c", program]
    ran = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr, ran.returncode) == ("done\n", "", 0)


def test_a_stage_whose_launcher_died_before_it_began_ends(project):
    """While it imports, it watches nothing yet."""
    orphan = "subprocess.Popen([sys.executable, 'stage.py'], env=os.environ | {'DVC_STAGE': 'work'})"
    words = [sys.executable, "-c", f"import os, subprocess, sys; print({orphan}.pid)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(words, cwd=project, env=environment, start_new_session=True, **streams)
    stage = int(launcher.stdout.readline())  # it may end before it has said so itself
    assert launcher.wait() == 0
    wait_until(lambda: not alive(stage), 20)


# A stage that says whether it was launched, and as which process.
LAUNCHED = """
import os
from firstsight.core.processes import use_all_gpus

use_all_gpus("cpu")
rank, launched = os.environ.get("RANK", "alone"), "ACCELERATE_MIXED_PRECISION" in os.environ
os.write(1, f"{rank} {launched}\\n".encode())  # at once, so that lines of several processes do not mix
"""


@pytest.mark.parametrize(
    ("config", "printed"),
    [(None, "alone False\n"), ("{distributed_type: 'NO', num_processes: 1}", "alone True\n")],
    ids=["one process", "accelerate config"],
)
def test_a_stage_is_launched_where_accelerate_is_configured(tmp_path, config, printed):
    home = tmp_path / "home/accelerate"
    home.mkdir(parents=True)
    if config:
        (home / "default_config.yaml").write_text(config)
    assert probe(tmp_path, [sys.executable]) == printed


def test_a_process_for_each_gpu_is_started_without_a_warning(tmp_path):
    """accelerate starts them whether there are GPUs or not; each is then a stage that was launched."""
    assert sorted(probe(tmp_path, launcher(2)).splitlines()) == ["0 True", "1 True"]


def test_on_several_nodes_srun_starts_a_launcher_on_each():
    """How processes work together is said by the file of `accelerate config`, if there is one, as on one machine."""
    alone, configured = on_nodes(2, 8, configured=False), on_nodes(2, 8, configured=True)
    assert alone[:7] == ["srun", "--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"]
    for words in (alone, configured):
        assert (words[words.index("--num_machines") + 1], words[words.index("--num_processes") + 1]) == ("2", "16")
    assert "--multi_gpu" in alone
    assert "--multi_gpu" not in configured


def probe(folder: Path, launched_by: list[str]) -> str:
    """What a stage prints; nothing else is said."""
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()  # the whole package, in place of the repository's
    (folder / "stages/probe.py").write_text(LAUNCHED)
    words = [*launched_by, "-m", "stages.probe"]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"PYTHONPATH": f"{folder}:{ROOT}", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout

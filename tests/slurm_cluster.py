"""A Slurm of one or two nodes for tests: Debian's daemons, as this user, on ports and in a folder of their own."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
# Debian keeps daemons where only root looks.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# Nodes are daemons on this machine, each of two cores, whatever the machine has; one that is silent for a few seconds
# is taken for dead, and serves again once it is restarted. Jobs of the partition `urgent` preempt those of `usual`. A
# job that is queued again waits until the credential of its last start has expired: 120 seconds, if nothing were said.
CONFIGURATION = """
ClusterName=firstsight
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=1
SlurmdParameters=config_overrides
SlurmdTimeout=6
ReturnToService=2
{nodes}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing() -> list[str]:
    return [daemon for daemon in DAEMONS if not shutil.which(daemon, path=PATH)]


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen]

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints that finds this cluster."""
        environment = self.environment | variables
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """JobState, Restarts and what else `scontrol show job` says of it."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, seconds: float = 180) -> dict[str, str]:
        """The job's state, once it is one of these."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"{state}\n{self.logs()}"
            time.sleep(0.3)
        return state

    def kill(self, node: str, project: Path) -> None:
        """Kill a node as a loss of power does: its daemon, and all processes of its tasks, which work in `project`."""
        self.nodes[node].kill()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                on_node = process.environ().get("SLURMD_NODENAME") == node
                if on_node and Path(process.cwd()) == project:
                    for one in (*(above for above in process.parents() if above.name() == "slurmstepd"), process):
                        one.kill()

    @contextmanager
    def restarted(self, node: str) -> Iterator[None]:
        """Have a killed node serve again, until the block ends."""
        with daemon(["slurmd", "-D", "-N", node], self.folder, self.environment):
            yield

    def logs(self) -> str:
        return "\n".join("\n".join(path.read_text().splitlines()[-20:]) for path in self.folder.glob("*.log"))


@contextmanager
def cluster(folder: Path, names: Sequence[str] = ("node1",)) -> Iterator[Cluster]:
    """Start munged, slurmctld and a slurmd a node in `folder`, and stop them, with their jobs, when the block ends.

    The folder's path must be short. A job's step has a socket there, and where its path has more than 107 characters
    Slurm starts the step again and again, without saying why.
    """
    assert len(f"{folder}/spool/{max(names)}/{max(names)}_1.4294967291") < 108, folder
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    ports = free_ports(1 + len(names))
    host = socket.gethostname().split(".")[0]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
        for name, port in zip(names, ports[1:], strict=True)
    )
    configuration = CONFIGURATION.format(host=host, user=user, folder=folder, controller_port=ports[0], nodes=nodes)
    (folder / "slurm.conf").write_text(configuration)
    environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    version = subprocess.run(["slurmd", "-V"], env=environment, capture_output=True, text=True, check=True).stdout
    if version.split()[-1] >= "23.11":
        # From then on slurmd wants control groups, which a container rarely has, unless it is told not to.
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "seed", "log")]
    with ExitStack() as stack:
        stack.enter_context(daemon(munge, folder, environment))
        wait_for((folder / "munge.socket").exists, folder)
        stack.enter_context(daemon(["slurmctld", "-D"], folder, environment))
        slurmds = {
            name: stack.enter_context(daemon(["slurmd", "-D", "-N", name], folder, environment)) for name in names
        }
        one = Cluster(folder, environment, slurmds)
        wait_for(lambda: sinfo(environment).split() == ["idle"], folder)
        try:
            yield one
        finally:
            one.run("scancel", "--user", user)
            wait_for(lambda: not one.run("squeue", "--noheader"), folder)


@contextmanager
def daemon(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    with (folder / f"{Path(words[-1]).name}.out.log").open("w") as output:
        process = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def sinfo(environment: dict[str, str]) -> str:
    words = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(ready, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        logs = "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, f"Slurm is not ready after {seconds} s\n{logs}"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()

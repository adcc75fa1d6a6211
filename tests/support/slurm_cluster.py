"""A SLURM cluster of two small, unequal nodes on one machine: one slurmctld and two slurmd, which the tests start and stop.

It needs SLURM's programs (Debian: apt-get install slurm-wlm), but neither root nor munge. It does not touch the machine's
configuration: everything lives in one folder.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = {"alpha": 3, "beta": 2}
"""The nodes and their numbers of GPUs, for which device files stand in."""


MISSING = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
needs_slurm = pytest.mark.skipif(
    bool(MISSING), reason=f"no SLURM here ({', '.join(MISSING)} not found): apt-get install slurm-wlm"
)


class Cluster:
    """Partition `high` can preempt partition `low`, the default, whose jobs then get SIGTERM and are requeued."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "state").mkdir(parents=True)
        ports = _free_ports(1 + len(NODES))
        self._config = folder / "slurm.conf"
        self._config.write_text(_configuration(folder, ports))
        (folder / "gres.conf").write_text(_gpus())

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self._launch("slurmctld", "-D")
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
            self._launch("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "--noheader", "--format=%T %D").split() != ["idle", str(len(NODES))]:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.log"))
                raise RuntimeError(f"the SLURM cluster did not start:\n{logs}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End every job and the daemons."""
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=self.environment(), timeout=30)
        try:
            self.wait(lambda: not self.run("squeue", "--noheader"), "the jobs to end", 40)
        finally:
            for daemon in self._daemons:
                daemon.terminate()
            for daemon in self._daemons:
                daemon.wait(30)

    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands talk to this cluster."""
        return os.environ | {"SLURM_CONF": str(self._config), "PATH": SEARCH_PATH}

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command against the cluster and return its output."""
        done = subprocess.run(command, cwd=cwd, env=self.environment() | variables, capture_output=True, text=True, timeout=60)
        if done.returncode and "Unable to contact" not in done.stderr:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says about a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ..."""
        return self.job(number)["JobState"]

    def end_of(self, number: str, seconds: float = 400) -> str:
        """Wait until a job has ended; returns its last state."""
        self.wait(lambda: self.state(number) not in ("PENDING", "RUNNING", "COMPLETING"), f"the end of job {number}", seconds)
        return self.state(number)

    def start_again(self, number: str, restarts: int) -> None:
        """Wait until a job has been requeued for the `restarts`-th time, and let it start soon.

        SLURM holds a requeued job for two minutes so that no node still lists the credential of the last start as revoked; one
        second is enough for that. It may set the delay again when the last node has been cleaned up.
        """

        def started() -> bool:
            job = self.job(number)
            if job["Restarts"] != str(restarts) or job["JobState"] != "PENDING":
                # A job that is being requeued passes through other states.
                return job["Restarts"] == str(restarts) and job["JobState"] in ("RUNNING", "COMPLETED", "FAILED")
            held = job["EligibleTime"] == "Unknown"
            if not held and datetime.fromisoformat(job["EligibleTime"]) - datetime.now() > timedelta(seconds=4):
                self.run("scontrol", "update", f"jobid={number}", "starttime=now+3")
            return False

        self.wait(started, f"job {number} to start for the {restarts + 1}th time", 400)

    def wait_in_job(self, number: str, condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
        """Wait until `condition()` holds while the job runs."""

        def holds() -> bool:
            if not condition() and self.state(number) not in ("PENDING", "RUNNING", "COMPLETING"):
                raise RuntimeError(f"job {number} ended ({self.state(number)}) before {what}")
            return condition()

        self.wait(holds, what, seconds)

    @staticmethod
    def wait(condition: Callable[[], bool], what: str, seconds: float) -> None:
        """Wait until `condition()` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for {what}")
            time.sleep(0.2)

    def _launch(self, *command: str) -> None:
        log = (self.folder / f"{'-'.join(command)}.log").open("wb")
        program = shutil.which(command[0], path=SEARCH_PATH)
        assert program is not None
        self._daemons.append(
            subprocess.Popen([program, *command[1:]], env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        )


def _configuration(folder: Path, ports: list[int]) -> str:
    """The number of the first job is random: the rendezvous port derives from it, and other clusters may run on this
    machine."""
    user, host = getpass.getuser(), socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory={1000 * gpus} Gres=gpu:{gpus}"
        for (node, gpus), port in zip(NODES.items(), ports[1:], strict=True)
    )
    return f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1
KillWait=120
FirstJobId={random.randrange(1000, 60000)}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def _gpus() -> str:
    """SLURM's list of the nodes' GPUs. SLURM requires each to be a device file, but opens none."""
    devices = ("/dev/null", "/dev/zero", "/dev/full")
    return "".join(f"NodeName={node} Name=gpu File={device}\n" for node, gpus in NODES.items() for device in devices[:gpus])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()

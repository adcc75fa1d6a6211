"""How the job's script uses what SLURM says about the job, the user's words and the node, without SLURM."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SRUN = """#!/usr/bin/env bash
echo "port $MASTER_PORT $*" >>"$CALLS"
[[ $* != *slurm/settings.py* ]] || exec "$KDRL_PYTHON"
[[ $* == *kdrl_mcore.train* ]] || exit 0
eval "$ON_TRAIN"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
case $* in
  *'show job'*) cat "$RECORDS" ;;
  'show step 70.1') echo StepId=70.1 ;;
  *) eval "$ON_REQUEST" ;;
esac
"""
SETTINGS = """#!/usr/bin/env bash
printf '%s\\n' config_nodes=1 server_nodes=0 ranks_per_node="${RANKS:-1}" gpus="${GPUS:-0}" run_dir="$RUN" 'server_overrides=()'
"""
STOPPED = """touch "$KDRL_LOG_DIR/asked-to-stop"
echo 'stopped on SIGUSR1 after step 5 of 9' >"$KDRL_LOG_DIR/train-node0.log"
mkdir -p "$RUN/checkpoints"
ln -sfn step_000005 "$RUN/checkpoints/latest"
"""
RECORD = (
    "JobId=70 {array}JobName=my job UserId=me(1) JobState={state} Requeue={requeue} Restarts=2 BatchFlag={batch} "
    "StartTime=2026-01-01T10:00:00 SuspendTime={suspended} {gres}Command=/r/slurm/kdrl_70b.sh a=b WorkDir={folder} StdErr=/x \n"
)
EARLIER = "JobId=71 ArrayJobId=70 ArrayTaskId=3 JobState=RUNNING Requeue=1 Restarts=0 BatchFlag=1 \n"


class Job:
    """The script of the 70B job, run with stand-ins for SLURM's programs and for the settings' Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": SETTINGS, "sleep": "#!/bin/sh\n"}.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(self, *overrides: str, record: dict[str, str] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it; `record` has the entries of the job's record that are unusual."""
        fields = {
            "array": "",
            "state": "RUNNING",
            "requeue": "1",
            "batch": "1",
            "suspended": "None",
            "folder": self.folder,
            "gres": "",
        }
        (self.folder / "records").write_text(EARLIER + RECORD.format(**fields | (record or {})))
        (self.folder / "calls").write_text("")
        job = {"SLURM_JOB_ID": "70", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1", "KDRL_PREFLIGHT": "0"}
        job |= {"CALLS": f"{self.folder}/calls", "RECORDS": f"{self.folder}/records", "RUN": f"{self.folder}/run"}
        job |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "KDRL_PYTHON": f"{self.folder}/bin/python"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | job | variables
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / "kdrl_70b.sh"), *overrides],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def calls(self, beginning: str) -> list[str]:
        """The calls of the stand-ins that begin with these words."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(beginning)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({}, "70"),
        ({"array": "ArrayJobId=70 ArrayTaskId=4 "}, "70_4"),
        ({"gres": "TimeLimit=00:15:00 PreemptTime=2026-01-01T10:00:01 "}, "70"),
        ({"gres": "TimeLimit=1-00:15:00 PreemptTime=None "}, "70"),
    ],
    ids=["a job", "an array's last task", "preempted at its start", "asked by hand at its start"],
)
def test_a_stopped_job_goes_back_to_the_queue_and_takes_no_other_task_with_it(
    record: dict[str, str], name: str, job: Job
) -> None:
    """`scontrol requeue 70` would requeue every task of array 70."""
    done = job.run(record=record, ON_TRAIN=STOPPED, SLURM_ARRAY_TASK_ID="9", SLURM_ARRAY_JOB_ID="8", SLURM_RESTART_COUNT="5")
    assert done.returncode == 0, done.stderr
    assert "train was asked to stop: job 70 goes back to the queue" in done.stdout
    assert job.calls("scontrol requeue") == [f"scontrol requeue {name}"]
    assert (job.folder / "run" / "logs" / "70-2").is_dir()


@pytest.mark.parametrize(
    ("record", "on_request", "message"),
    [
        ({"requeue": "0"}, "", "The job does not go back to the queue, as it has --no-requeue: "),
        ({"batch": "0"}, "", "The job does not go back to the queue, as it is interactive: "),
        ({}, "exit 1", "SLURM refused to requeue it: "),
        ({"array": "JobId="}, "", "SLURM does not respond, so the job cannot go back to the queue: "),
        ({"gres": "TimeLimit=00:15:00 "}, "", "(--signal, 900 s): increase it with --time, or use sbatch --signal=B:USR1@60: "),
        ({"gres": "TimeLimit=00:45:00 PreemptTime=2026-01-01T09:59:59 "}, "", "or use sbatch --signal=B:USR1@60: "),
    ],
    ids=["--no-requeue", "salloc", "refused", "no answer", "a warning at each start", "a long lead time"],
)
def test_a_job_that_cannot_go_back_to_the_queue_says_how_to_go_on(
    record: dict[str, str], on_request: str, message: str, job: Job
) -> None:
    if message.startswith("SLURM does not respond"):
        (job.folder / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = job.run(record=record, ON_TRAIN=STOPPED, ON_REQUEST=on_request)
    assert done.returncode == 0, done.stderr
    assert f"{message}submit the same command again, it resumes from step_000005\n" in done.stdout
    assert "finished" not in done.stdout


def test_rules_and_functions_that_the_users_shell_exports_change_nothing(job: Job) -> None:
    """In POSIX mode bash forgets the exit code of a step that has ended."""
    functions = {f"BASH_FUNC_{name}%%": f"() {{ echo of the user; command {name} -h; }}" for name in ("cd", "grep", "srun")}
    options = {"POSIXLY_CORRECT": "1", "SHELLOPTS": "noglob:noclobber:braceexpand", "BASHOPTS": "nullglob:failglob"}
    done = job.run(
        record={"gres": "TimeLimit=01:00:00 "}, ON_TRAIN=STOPPED, SLURM_TIME_FORMAT="relative", **options, **functions
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "train was asked to stop: job 70 goes back to the queue" in done.stdout and "of the user" not in done.stdout
    assert job.calls("scontrol requeue") == ["scontrol requeue 70"]


def test_training_that_was_asked_in_its_last_step_is_finished(job: Job) -> None:
    done = job.run(ON_TRAIN='touch "$KDRL_LOG_DIR/asked-to-stop"')
    assert done.returncode == 0 and done.stdout.endswith(" finished\n") and not job.calls("scontrol requeue")


@pytest.mark.parametrize(
    ("suspended", "returns"), [("None", False), ("2026-01-01T09:59:59", False), ("2026-01-01T10:00:01", True)]
)
def test_a_run_that_a_suspension_ended_goes_back_to_the_queue(suspended: str, returns: bool, job: Job) -> None:
    """The run's collectives exceed their time limits. A run that ends with an error line is not requeued."""
    done = job.run(record={"suspended": suspended}, ON_TRAIN="exit 75")
    assert bool(job.calls("scontrol requeue")) == returns, done.stdout
    error = 'echo "error: no" >"$KDRL_LOG_DIR/train-node0.log"; exit 1'
    done = job.run(record={"suspended": suspended}, ON_TRAIN=error)
    assert done.returncode == 1 and not job.calls("scontrol requeue")


def test_words_mean_what_they_would_in_the_shell_and_in_sbatch(job: Job) -> None:
    me = pwd.getpwuid(os.getuid())
    words = [
        "run.dir=~/a b/%A_%a",
        f"student.path=~{me.pw_name}/s",
        "teacher.path=/t/~x",
        "trainer.seed=%a",
        "reward=~nobody_here/x",
    ]
    job.run(*words, record={"array": "ArrayJobId=70 ArrayTaskId=4 "}, HOME="/home/of me")
    (train,) = job.calls("port")
    expected = (
        f" run.dir=/home/of me/a b/70_4 student.path={me.pw_dir}/s teacher.path=/t/~x trainer.seed=4 reward=~nobody_here/x "
    )
    assert expected in train
    job.run("run.dir=/r/%a")
    assert " run.dir=/r/%a " in job.calls("port")[0]  # a separate job may name it so


def test_a_step_meets_where_nobody_else_listens(job: Job) -> None:
    expected = 20001 + 70 * 8
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", expected))
        taken.listen()
        job.run()
        assert job.calls("port")[0].split()[1] == str(expected + 1)


def test_a_step_asks_for_no_more_than_the_launcher_says(job: Job) -> None:
    """Options of sbatch and interactive jobs set variables that srun reads; these are not for this step."""
    left = {"SLURM_GPUS_PER_TASK": "1", "SLURM_NTASKS_PER_GPU": "1", "SLURM_CPUS_PER_TASK": "9", "SLURM_MEM_PER_NODE": "5"}
    left |= {"SLURM_CPU_BIND": "rank", "SLURM_STDERRMODE": "/x", "SLURM_NETWORK": "kept", "SLURM_STEP_GRES": "gpu:1"}
    job.run(ON_TRAIN='env | grep -E "^(SLURM|SRUN)_" | sed "s/^/left /" >>"$CALLS"', **left)
    names = {line.split()[1].split("=")[0] for line in job.calls("left")}
    assert names & left.keys() == {"SLURM_NETWORK"}
    assert " --export=ALL " in job.calls("port")[0] and " --mpi=none " in job.calls("port")[0]


def test_steps_ask_for_gpus_where_slurm_counts_them(job: Job) -> None:
    """An exclusive job has all of them, its steps those that they request."""
    alike = "Nodes=n[1-2] CPU_IDs=0-95 Mem=1 GRES=gpu:h100:6(IDX:0,2-6),nvme:1(CNT:1),gpu:mig:2(IDX:7-8) "
    job.run(record={"gres": alike}, RANKS="8", GPUS="9")
    assert " --gres=gpu:8 " in job.calls("port")[0]
    job.run(record={"gres": alike}, RANKS="8", GPUS="0")
    job.run(record={"gres": "Nodes=n1 CPU_IDs=0-95 Mem=1 GRES= "}, RANKS="8", GPUS="8")
    assert " --gres" not in job.calls("port")[0]
    for other in ("GRES=gpu:4(IDX:0-3)", "GRES="):
        done = job.run(record={"gres": f"{alike}  Nodes=n3 CPU_IDs=0-95 Mem=1 {other} "}, RANKS="8", GPUS="8")
        assert done.stderr.startswith("error: n3 has ") and not job.calls("port")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"array": "HetJobId=70 HetJobOffset=0 "}, "this is a job of several components (sbatch ... : ...)"),
        ({"folder": "/no such/folder"}, "/no such/folder is not on "),
        ({}, "srun has started this script 4 times"),
    ],
    ids=["heterogeneous", "a folder of the login node", "srun"],
)
def test_an_allocation_that_cannot_be_used_is_refused_in_one_line(record: dict[str, str], message: str, job: Job) -> None:
    done = job.run(record=record, **({} if record else {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "1"}))
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not job.calls("port")


def test_pythons_that_do_not_fit_are_named(job: Job) -> None:
    done = job.run(KDRL_PYTHON="no-such-python", CONDA_PREFIX="/conda/envs/mine", VIRTUAL_ENV="")
    assert "error: no Python at no-such-python on " in done.stderr
    assert "(KDRL_PYTHON=/conda/envs/mine for the environment that is active)" in done.stderr
    command = [sys.executable, "-S", "-E", str(ROOT / "slurm" / "settings.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {sys.executable} is not this project's Python (No module named ")
    (job.folder / "venv" / "bin").mkdir(parents=True)
    (job.folder / "bin" / "python").rename(job.folder / "venv" / "bin" / "python")
    for name in (f"{job.folder}/venv", "venv/bin/python"):
        done = job.run(KDRL_PYTHON=name, ON_TRAIN='echo "python $KDRL_PYTHON" >>"$CALLS"')
        assert done.returncode == 0 and job.calls("python") == [f"python {job.folder}/venv/bin/python"]


@pytest.mark.parametrize(
    "command",
    [
        "{root}/slurm/kdrl_70b.sh",
        "{root}/slurm/mine.sh run.dir=/scratch/slurm/x y.path=/z.sh",
        "{root}/slurm/kdrl_70b.sh teacher.path=/other/slurm/models",
    ],
)
def test_the_repository_is_found_by_what_slurm_says_of_the_script(command: str, job: Job) -> None:
    """The scripts are in a folder whose name has a blank and another "slurm"; the batch script itself is a copy elsewhere."""
    root = job.folder / "slurm" / "my tools"
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (job.folder / "spool").mkdir()
    shutil.copy(ROOT / "slurm" / "kdrl_70b.sh", job.folder / "spool" / "slurm_script")
    record = f"JobId=70 JobName=x\n   Command={command.format(root=root)}\n   WorkDir=/w\n"
    (job.folder / "bin" / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{record * 2}END\n")
    environment = {"PATH": f"{job.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "n"}
    environment |= {"SLURM_JOB_NUM_NODES": "1", "KDRL_PYTHON": f"{job.folder}/bin/python", "RUN": f"{job.folder}/run"}
    environment |= {"KDRL_PREFLIGHT": "0", "CALLS": f"{job.folder}/calls", "ON_TRAIN": 'echo "root $KDRL_ROOT" >>"$CALLS"'}
    script = ["bash", str(job.folder / "spool" / "slurm_script")]
    done = subprocess.run(script, cwd=job.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert job.calls("root") == [f"root {root}"]
    (job.folder / "bin" / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(script, cwd=job.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: ./slurm has no launch.sh: submit a script from the repository's slurm folder, or" in done.stderr

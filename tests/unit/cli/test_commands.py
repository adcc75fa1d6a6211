"""The commands: how they start ranks, what their --help says, and the completion of keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kdrl_mcore.cli import commands, ranks, serve
from kdrl_mcore.cli.__main__ import NAMES
from kdrl_mcore.cli.completion import completion

ON_RANKS = ("train", "evaluate", "score", "preflight")


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "kdrl_mcore.cli", *words]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=240)


def test_an_error_that_all_ranks_meet_is_one_line() -> None:
    """Two processes start and each loads torch, which takes seconds. The error occurs before a world is built."""
    done = run("train", "--ranks", "2", "optimizer.lrr=1")
    assert done.stderr == "error: unknown configuration key 'optimizer.lrr'; did you mean 'optimizer.lr'?\n"
    assert done.returncode == 2


def test_ranks_run_the_command_with_the_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, list[str]]] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ranks, "launch", lambda number, words: started.append((number, words)) or 7)
    for words in (["--ranks", "4", "a=1", "--config", "f"], ["a=1", "--ranks=4", "--config", "f"]):
        monkeypatch.setattr(sys, "argv", ["kdrl-train", *words])
        assert commands.train() == 7
    assert started == 2 * [(4, [sys.executable, "-u", "-m", "kdrl_mcore.cli", "train", "a=1", "--config", "f"])]


RANK = """import os, pathlib, signal, sys, time
from kdrl_mcore.cli.commands import end_with_launcher
launcher, folder = os.getppid(), pathlib.Path(sys.argv[2])
end_with_launcher()
rank, ranks, what, _, name, to = os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]
def save(number, _):
    time.sleep(0.1)  # while the same signal may arrive again
    os.write(1, f"rank {rank} of {ranks} saves on {signal.Signals(number).name}\\n".encode())  # in one piece
    os._exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL if what == "starting" else save)
if what == "interrupted":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
(folder / f"{rank}-{os.getpid()}").touch()
while len(list(folder.iterdir())) < int(ranks):
    time.sleep(0.02)
if rank == "0" and what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif rank == "0":
    {"group": os.killpg, "leader": os.kill}[to](launcher, getattr(signal, name))
time.sleep(60)
"""


LAUNCHERS = """import json, os, sys
from kdrl_mcore.cli.ranks import launch
for line in sys.stdin:
    ranks, words, files = json.loads(line)
    launcher = os.fork()
    if launcher == 0:
        os.setsid()
        for number, file in files:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o644), number)
        code = 1
        try:
            code = launch(ranks, [sys.executable, *words])
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]), flush=True)
"""
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


@pytest.fixture(scope="module")
def launchers() -> Iterator[subprocess.Popen[str]]:
    """Loads torch once, which takes seconds, and forks each launcher."""
    command = [sys.executable, "-c", LAUNCHERS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("ranks", "what", "name", "to", "code"),
    [
        *((ranks, "stopped", name, to, 0) for ranks in (1, 2) for name in SIGNALS for to in ("group", "leader")),
        *((2, "starting", name, "leader", 128 + getattr(signal, name)) for name in SIGNALS),
        (2, "interrupted", "SIGINT", "group", 130),
        (2, "killed", "", "", 1),
        (2, "orphaned", "SIGKILL", "leader", -signal.SIGKILL),
    ],
)
def test_ranks_hear_signals_and_one_that_fails_is_named(
    ranks: int, what: str, name: str, to: str, code: int, launchers: subprocess.Popen[str], tmp_path: Path
) -> None:
    """A terminal, `timeout` or SLURM signals the launcher's process group, `kill` the launcher alone; no rank is in the group.
    Ranks that are still starting end by the signal, and those that are interrupted again with their own line: both without
    an error. If the launcher is killed, its ranks end."""
    (started := tmp_path / "started").mkdir()
    output, errors = tmp_path / "output", tmp_path / "errors"
    words = ["-c", RANK, what, str(started), name, to]
    assert launchers.stdin is not None and launchers.stdout is not None
    print(json.dumps([ranks, words, [(1, str(output)), (2, str(errors))]]), file=launchers.stdin, flush=True)
    assert int(launchers.stdout.readline()) == code, errors.read_text()
    saved = {f"rank {rank} of {ranks} saves on {name}" for rank in range(ranks)} if what == "stopped" else set()
    killed = "error: rank 0 was ended by SIGKILL (by Linux, if the machine ran out of memory)\n" if what == "killed" else ""
    assert errors.read_text() == killed
    assert what == "killed" or set(output.read_text().splitlines()) == saved  # the launcher ends the rank that was not killed
    deadline = time.monotonic() + 20
    while still := [file.name for file in started.iterdir() if is_running(int(file.name.partition("-")[2]))]:
        assert time.monotonic() < deadline, still
        time.sleep(0.05)


def test_modules_of_the_working_folder_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with `python -m`, a user's rewards are found. A program in a folder of programs would search only that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/opt/venv/bin", *sys.path[1:]])
    monkeypatch.setattr(sys, "argv", ["kdrl-slurm", "jobs"])
    assert commands.slurm() == 0
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("words", [["--ranks"], ["--ranks", "0"], ["--ranks=-1"], ["--ranks", "two"], ["--ranks=\u00b2"]])
def test_a_wrong_number_of_ranks_is_one_line(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdrl-score", *words])
    assert commands.score() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --ranks") and errors.count("\n") == 1


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["kdrl-evaluate", "--ranks", "2"])
    assert commands.evaluate() == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it takes many seconds, and help does not need it
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    try:
        code = getattr(commands, name.replace("-", "_"))()
    except SystemExit as end:  # from argparse
        code = end.code
    text = capsys.readouterr().out
    assert code == 0 and text.startswith(f"usage: kdrl-{name} ")
    assert ("--ranks N" in text) == (name in ON_RANKS)


def test_ranks_cut_short_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """argparse would accept `--rank` for `--ranks`, and one rank would do the work of two."""
    monkeypatch.setattr(sys, "argv", ["kdrl-score", "--input", "R.jsonl", "--rank", "2"])
    assert commands.score() == 2
    assert capsys.readouterr().err == "error: write --ranks N in full (--help lists the options)\n"


def test_a_server_without_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert serve.main(["--run-dir", "run", "--index", "0", "--model", "model"]) == 2
    assert capsys.readouterr().err == "error: vLLM is not installed: pip install 'kdrl-mcore[vllm]'\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kdrl-train optimizer.sche", "optimizer.schedule="),
        ("kdrl-plan --config x cluster=h", "h100 |h200 "),
        ("kdrl-train model.dtype=b", "bfloat16 "),
        ("kdrl-train trainer.self_test=", "true |false "),
        ("kdrl-evaluate --config-", "--config-dir "),
    ],
)
def test_keys_and_choices_complete_in_bash(line: str, expected: str) -> None:
    probe = 'COMP_LINE=$1 COMP_POINT=${#1}; _kdrl; IFS="|"; echo -n "${COMPREPLY[*]}"'
    command = ["bash", "-c", f"{completion('bash')}\n{probe}", "bash", line]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected

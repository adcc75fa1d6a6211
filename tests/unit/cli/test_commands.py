"""The commands: how they start ranks, what their --help says, and the completion of keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
rank, what, ready = os.environ["RANK"], sys.argv[1], pathlib.Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
def save(*_):
    os.write(1, f"rank {rank} of {os.environ['WORLD_SIZE']} saves\\n".encode())  # in one piece, beside the other rank's
    sys.exit(0)
signal.signal(signal.SIGINT, save)
if rank == "1":
    {"killed": lambda: os.kill(os.getpid(), 9), "stopped": ready.touch}[what]()
else:
    while not ready.exists():
        time.sleep(0.05)
    os.kill(os.getppid(), signal.SIGINT)  # one Ctrl-C, where the terminal reaches the launcher alone
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "code", "output", "errors"),
    [
        ("stopped", 0, {"rank 0 of 2 saves", "rank 1 of 2 saves"}, ""),
        ("killed", 1, set(), "error: rank 1 was ended by SIGKILL (by Linux, if the machine ran out of memory)\n"),
    ],
)
def test_ranks_hear_signals_and_one_that_fails_is_named(
    what: str, code: int, output: set[str], errors: str, tmp_path: Path
) -> None:
    """The launcher takes a second or two to load torch."""
    program = "import sys; from kdrl_mcore.cli.ranks import launch; sys.exit(launch(2, [sys.executable, *sys.argv[1:]]))"
    command = [sys.executable, "-c", program, "-c", RANK, what, str(tmp_path / "ready")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.returncode, set(done.stdout.splitlines()), done.stderr) == (code, output, errors)


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
        code = getattr(commands, name)()
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

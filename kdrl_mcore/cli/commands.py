"""The entry points of the commands `kdrl-NAME`, of `python -m kdrl_mcore.train`, and of `python tools/NAME.py` in a checkout.

Slow modules are imported only once the command is known, so that Ctrl-C during the imports ends it without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

RANKS = "--ranks"
LAUNCHER = "KDRL_LAUNCHER_PID"
"""The environment variable by which a rank knows the process that started it for `--ranks`."""


def train() -> int:
    """Train (`kdrl_mcore/cli/train.py`)."""
    return _on_ranks("train")


def preflight() -> int:
    """Check a job in its first minute (`kdrl_mcore/cli/preflight.py`)."""
    return _on_ranks("preflight")


def evaluate() -> int:
    """Evaluate a model (`kdrl_mcore/cli/evaluate.py`)."""
    return _on_ranks("evaluate")


def score() -> int:
    """Score the tokens of a rollout file (`kdrl_mcore/cli/score.py`)."""
    return _on_ranks("score")


def convert() -> int:
    """Convert checkpoints (`kdrl_mcore/cli/convert.py`)."""
    return _run("kdrl_mcore.cli.convert")


def plan() -> int:
    """Plan memory and time of a run (`kdrl_mcore/cli/plan.py`)."""
    return _run("kdrl_mcore.cli.plan")


def report() -> int:
    """Compare runs (`kdrl_mcore/cli/report.py`)."""
    return _run("kdrl_mcore.cli.report")


def study() -> int:
    """Run the runs of a study (`kdrl_mcore/cli/study.py`)."""
    return _run("kdrl_mcore.cli.study")


def serve() -> int:
    """Serve a vLLM engine (`kdrl_mcore/cli/serve.py`)."""
    return _run("kdrl_mcore.cli.serve")


def serve_teacher() -> int:
    """Serve a teacher (`kdrl_mcore/cli/serve_teacher.py`)."""
    return _run("kdrl_mcore.cli.serve_teacher")


def slurm() -> int:
    """Write the SLURM scripts (`kdrl_mcore/cli/slurm.py`)."""
    return _run("kdrl_mcore.cli.slurm")


def _on_ranks(name: str) -> int:
    """Run the command; with `--ranks N`, on N ranks that are started on this machine."""
    end_with_launcher()
    arguments, ranks = take_ranks(sys.argv[1:])
    if ranks is None or {"-h", "--help"} & set(arguments):
        return _run(f"kdrl_mcore.cli.{name}")
    if not ranks.isdecimal() or int(ranks) == 0:
        print(f"error: {RANKS}={ranks} must be the number of ranks to start on this machine, at least 1", file=sys.stderr)
        return 2
    if "RANK" in os.environ:
        print(f"error: {RANKS} starts ranks, but torchrun or SLURM has already started them: leave it out", file=sys.stderr)
        return 2
    from kdrl_mcore.cli.ranks import launch

    return launch(int(ranks), [sys.executable, "-u", "-m", "kdrl_mcore.cli", name, *arguments])


def end_with_launcher() -> None:
    """In a rank that `--ranks` started: end when the launcher is killed. Otherwise the ranks would train on, and hold the run
    directory."""
    if LAUNCHER in os.environ:
        from kdrl_mcore.resilience.interrupt import end_with_parent

        end_with_parent(int(os.environ.pop(LAUNCHER)))


def take_ranks(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without `--ranks N` or `--ranks=N`, and the text of N, or None if the option is not given."""
    kept, ranks = list[str](), None
    words = iter(arguments)
    for word in words:
        if word == RANKS:
            ranks = next(words, "")
        elif word.startswith(f"{RANKS}="):
            ranks = word.partition("=")[2]
        else:
            kept.append(word)
    return kept, ranks


def _run(module: str) -> int:
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # for reward modules in the working folder, where `python -m` looks anyway
    handler = signal.getsignal(signal.SIGINT)
    interruptible = handler is signal.default_int_handler  # False for background jobs, which ignore it
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    if interruptible:
        signal.signal(signal.SIGINT, handler)
    return main(sys.argv[1:])

"""The whole example: make the pair, train it with KDRL, GRPO and distillation alone from one start, and compare.

    python examples/tiny/demo.py        # or: make demo

KDRL runs with real tensor parallelism on two ranks; the two baselines then run side by side, one process each. All three see
the same number of samples. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from examples.tiny.jobs import ROOT, Job, follow, start_training
from examples.tiny.make_pair import DEFAULT_DIR, make_pair
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics

PICTURE = DEFAULT_DIR / "demo.png"


@dataclass(frozen=True)
class Method:
    """One way to train the student: its name, its objective's overrides, and its ranks."""

    name: str
    overrides: tuple[str, ...]
    ranks: int = 1


KDRL = Method("kdrl", ("objective=kdrl", "objective.beta.init=0.1", "parallel.tensor=2"), ranks=2)
BASELINES = (Method("grpo", ("objective=grpo",)), Method("kd", ("objective=kd_rkl",)))
STAGES: tuple[tuple[Method, ...], ...] = ((KDRL,), BASELINES)
"""Methods of one stage run at the same time."""


def main() -> int:
    """Run the demo; exit code 1 with one line when a part of it fails."""
    parser = argparse.ArgumentParser(description="Train the tiny pair with KDRL, GRPO and distillation, and compare them.")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each method (default: %(default)s)")
    try:
        demo(parser.parse_args().steps)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def demo(steps: int) -> None:
    """Make the pair, train every method for `steps` steps, and show the comparison.

    Raises:
        KdrlError: a training run or the report failed.
    """
    started = time.monotonic()
    make_pair(DEFAULT_DIR)
    for stage in STAGES:
        jobs = [_start(method, steps) for method in stage if not is_complete(method, steps)]
        if jobs:
            print(f"training {' and '.join(job.name for job in jobs)}, {steps} steps", flush=True)
            follow(jobs)
    methods = [method for stage in STAGES for method in stage]
    _report(methods)
    _say_what_was_measured(methods)
    print(f"took {time.monotonic() - started:.0f} s; runs are in {DEFAULT_DIR}/, the picture is {PICTURE}", flush=True)


def is_complete(method: Method, steps: int) -> bool:
    """Whether the method's run has all its steps."""
    run_dir = ROOT / DEFAULT_DIR / method.name
    return (run_dir / METRICS_FILE).is_file() and int(read_metrics(run_dir)[-1]["step"]) >= steps


def _start(method: Method, steps: int) -> Job:
    overrides = ["experiment=tiny_cpu", f"trainer.steps={steps}", *method.overrides]
    return start_training(method.name, DEFAULT_DIR / method.name, overrides, method.ranks)


def _report(methods: Sequence[Method]) -> None:
    runs = [str(DEFAULT_DIR / method.name) for method in methods]
    command = [sys.executable, "tools/report.py", *runs, "--output", str(PICTURE)]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        raise KdrlError(f"tools/report.py failed on {' '.join(runs)}; its message stands above")


def _say_what_was_measured(methods: Sequence[Method]) -> None:
    for method in methods:
        rows = [row for row in read_metrics(ROOT / DEFAULT_DIR / method.name) if "eval/accuracy" in row]
        first, last = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]
        print(f"{method.name:<5} held-out accuracy {first:.1%} -> {last:.1%} ({100 * (last - first):+.1f} points)")


if __name__ == "__main__":
    sys.exit(main())

"""The whole example: make the pair, train it with KDRL, GRPO and distillation alone from one start, and compare.

    python examples/tiny/demo.py        # or: make demo

KDRL runs with real tensor parallelism on two ranks; the two baselines then run at the same time, one process each. All three
have the same number of samples and the same seeds. Complete runs are not repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.comparison import Training, outcome, report, train
from examples.tiny.make_pair import DEFAULT_DIR, make_pair
from kdrl_mcore.errors import KdrlError

SEEDS = (1,)
STEPS = 150


@dataclass(frozen=True)
class Method:
    """One way to train the student: its name, its objective's overrides, and its ranks."""

    name: str
    overrides: tuple[str, ...]
    ranks: int = 1


KDRL = Method(
    "kdrl",
    (
        "objective=kdrl_annealing",
        "objective.beta.init=0.05",
        "objective.beta.delta=0.0005",
        "objective.beta.min=0",
        "parallel.tensor=2",
    ),
    ranks=2,
)
"""Ten times the paper's coefficient (5e-3), which is for much larger models: here the gradient of the distillation would be
negligible next to that of the reward. It falls to zero at step 100, so that the last steps learn from the reward alone."""
BASELINES = (Method("grpo", ("objective=grpo",)), Method("kd", ("objective=kd_rkl",)))
STAGES: tuple[tuple[Method, ...], ...] = ((KDRL,), BASELINES)
"""The methods of a stage run at the same time."""


def training(method: Method, seed: int, steps: int, directory: Path) -> Training:
    """One run of the comparison, in `directory/NAME_seedN` (relative to the project root)."""
    return Training(
        run_dir=directory / f"{method.name}_seed{seed}",
        overrides=(
            "experiment=tiny_cpu",
            f"student.path={directory}/student",
            f"teacher.path={directory}/teacher",
            f"data.train={directory}/data/train.jsonl",
            f"data.eval={directory}/data/eval.jsonl",
            f"trainer.steps={steps}",
            f"trainer.seed={seed}",
            "checkpoint.resume=never",
            *method.overrides,
        ),
        ranks=method.ranks,
    )


def main() -> int:
    """Run the demo; returns the exit code, 1 with one line if a part of it fails."""
    parser = argparse.ArgumentParser(description="Train the tiny pair with KDRL, GRPO and distillation, and compare them.")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each method (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(SEEDS), help="train every method with each of these (default: 1)"
    )
    arguments = parser.parse_args()
    try:
        demo(DEFAULT_DIR, arguments.steps, arguments.seeds)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def demo(directory: Path, steps: int, seeds: Sequence[int]) -> None:
    """Make the pair in `directory`, train every method with every seed for `steps` steps, and show the comparison.

    Raises:
        KdrlError: a training run or the report failed.
    """
    started = time.monotonic()
    make_pair(directory)
    for stage in STAGES:
        for seed in seeds:
            train([training(method, seed, steps, directory) for method in stage])
    trainings = [training(method, seed, steps, directory) for stage in STAGES for method in stage for seed in seeds]
    picture = directory / "demo.png"
    report(trainings, picture)
    for line in outcome(trainings):
        print(line, flush=True)
    print(f"took {time.monotonic() - started:.0f} s; runs are in {directory}/, the picture is {picture}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""A real language model learns on two cores: make the pair, train the student with KDRL, and compare it with its start.

    python -m examples.smollm2.demo        # or: make demo-real

Both domains are evaluated on 100 held-out problems each: the one that is trained on, and the one in which something may be
forgotten. Complete runs are not repeated. The full form takes an hour and a half:

    python -m examples.smollm2.demo --methods grpo kd kdrl --steps 40 --problems 200 --eval-every 20
"""

from __future__ import annotations

import argparse
import sys
import time

from examples.comparison import Training, outcome, report, train
from examples.smollm2.fetch import DIRECTORY
from examples.smollm2.make_pair import RANKS, faster_dtype, make_pair
from kdrl_mcore.errors import KdrlError

STEPS, PROBLEMS = 16, 100
METHODS = {"kdrl": "kdrl_annealing", "grpo": "grpo", "kd": "kd_rkl"}
"""The objective of each method of the demo; `kdrl` alone is trained if no other is asked for."""
EXACT = ("objective.kd.estimator=exact",)
"""The estimator without sampling variance: with another one, a dozen steps of 32 short responses say little."""
KDRL = (*EXACT, "objective.beta.init=1", "objective.beta.delta=0.05", "objective.beta.min=0.2")
"""A large coefficient, and beta that falls to its floor in 16 steps; chosen on the validation set."""


def main() -> int:
    """Run the demo; returns the exit code, not 0 with one line if a part of it fails."""
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M-Instruct with KDRL on CPU, and compare it with its start.")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["kdrl"], help="trained one after the other (default: kdrl)"
    )
    parser.add_argument(
        "--problems",
        type=int,
        default=PROBLEMS,
        help="held-out problems of each domain, at most 200 and 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--eval-every", type=int, default=0, help="steps between evaluations (default: only at the start and the end)"
    )
    arguments = parser.parse_args()
    try:
        demo(arguments.methods, common(arguments.steps, arguments.problems, arguments.eval_every))
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def demo(methods: list[str], shared: tuple[str, ...]) -> None:
    """Make the pair, train the student with each method, and show the comparison.

    Args:
        shared: the overrides of every run.

    Raises:
        KdrlError: the model cannot be fetched, or a training run or the report failed.
    """
    started = time.monotonic()
    make_pair()
    trainings = [training(method, shared) for method in methods]
    for each in trainings:
        train([each])
    teacher = evaluation("teacher", shared)
    train([teacher])
    picture = DIRECTORY / "demo.png"
    report(trainings, picture)
    for line in outcome([teacher, *trainings]):
        print(line, flush=True)
    print(f"took {time.monotonic() - started:.0f} s; runs are in {DIRECTORY}/, the picture is {picture}", flush=True)


def training(method: str, shared: tuple[str, ...]) -> Training:
    """The run of a method."""
    own = KDRL if method == "kdrl" else EXACT if method == "kd" else ()
    return Training(DIRECTORY / method, ("experiment=smollm2", f"objective={METHODS[method]}", *own, *shared), RANKS)


def evaluation(model: str, shared: tuple[str, ...]) -> Training:
    """A run that only evaluates a model."""
    overrides = ("experiment=smollm2", "objective=grpo", f"student.path={DIRECTORY}/{model}", *shared, "trainer.steps=0")
    return Training(DIRECTORY / f"{model}_alone", overrides, RANKS)


def common(steps: int, problems: int, eval_every: int) -> tuple[str, ...]:
    """The overrides of every run."""
    evaluations = (f"eval.max_prompts={problems}", f"eval.every={eval_every}")
    return (f"trainer.steps={steps}", *evaluations, "checkpoint.resume=never", f"model.dtype={faster_dtype()}")


if __name__ == "__main__":
    sys.exit(main())

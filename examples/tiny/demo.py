"""The whole example: make the pair, train it with KDRL, GRPO and distillation alone from one start, and compare.

    python examples/tiny/demo.py        # or: make demo

KDRL runs with real tensor parallelism on two ranks; the two baselines then run side by side, one process each. All three see
the same number of samples and the same seeds. Runs that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from examples.tiny.jobs import ROOT, follow, start_training
from examples.tiny.make_pair import DEFAULT_DIR, make_pair
from kdrl_mcore.config import load_config
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics

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
lost beside that of the reward. It falls to zero at step 100, so that the reward alone has the last word."""
BASELINES = (Method("grpo", ("objective=grpo",)), Method("kd", ("objective=kd_rkl",)))
STAGES: tuple[tuple[Method, ...], ...] = ((KDRL,), BASELINES)
"""Methods of one stage run at the same time."""


@dataclass(frozen=True)
class Training:
    """One training run of the comparison, in `directory/NAME_seedN` (relative to the project root)."""

    method: Method
    seed: int
    steps: int
    directory: Path

    @property
    def run_dir(self) -> Path:
        """Where the run lives, relative to the project root."""
        return self.directory / f"{self.method.name}_seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        """What `kdrl_mcore.train` is called with, besides the run directory."""
        return [
            "experiment=tiny_cpu",
            f"student.path={self.directory}/student",
            f"teacher.path={self.directory}/teacher",
            f"data.train={self.directory}/data/train.jsonl",
            f"data.eval={self.directory}/data/eval.jsonl",
            f"trainer.steps={self.steps}",
            f"trainer.seed={self.seed}",
            "checkpoint.resume=never",
            *self.method.overrides,
        ]

    def is_complete(self) -> bool:
        """Whether this very configuration was trained to its end and exported, after the student was made."""
        run_dir = ROOT / self.run_dir
        config, metrics = run_dir / "config.yaml", run_dir / METRICS_FILE
        if not (config.is_file() and metrics.is_file() and (run_dir / "hf").is_dir()):
            return False
        if config.read_text() != OmegaConf.to_yaml(
            OmegaConf.structured(load_config([*self.overrides, f"run.dir={self.run_dir}"]))
        ):
            return False
        is_newer = metrics.stat().st_mtime > (ROOT / self.directory / "student").stat().st_mtime
        return is_newer and int(read_metrics(run_dir)[-1]["step"]) == self.steps


def main() -> int:
    """Run the demo; exit code 1 with one line when a part of it fails."""
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
            train([Training(method, seed, steps, directory) for method in stage])
    trainings = [Training(method, seed, steps, directory) for stage in STAGES for method in stage for seed in seeds]
    picture = directory / "demo.png"
    report(trainings, picture)
    for line in outcome(trainings):
        print(line, flush=True)
    print(f"took {time.monotonic() - started:.0f} s; runs are in {directory}/, the picture is {picture}", flush=True)


def train(trainings: Sequence[Training]) -> None:
    """Run those that are not complete at the same time, from the start."""
    missing = [training for training in trainings if not training.is_complete()]
    if not missing:
        return
    ranks = {1: "one rank", 2: "two tensor-parallel ranks"}
    for training in missing:
        shutil.rmtree(ROOT / training.run_dir, ignore_errors=True)
        print(f"training {training.run_dir.name}: {training.steps} steps on {ranks[training.method.ranks]}", flush=True)
    follow(
        [
            start_training(training.run_dir.name, training.run_dir, training.overrides, training.method.ranks)
            for training in missing
        ]
    )


def report(trainings: Sequence[Training], picture: Path) -> None:
    """Print the table of the runs and draw their curves.

    Raises:
        KdrlError: tools/report.py failed.
    """
    runs = [str(training.run_dir) for training in trainings]
    command = [sys.executable, "tools/report.py", *runs, "--output", str(picture)]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        raise KdrlError(f"tools/report.py failed on {' '.join(runs)}; its message stands above")


def outcome(trainings: Sequence[Training]) -> list[str]:
    """One line for each run: what it gained on the held-out problems."""
    lines = []
    for training in trainings:
        rows = [row for row in read_metrics(ROOT / training.run_dir) if "eval/accuracy" in row]
        first, last, error = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"], rows[-1]["eval/accuracy_stderr"]
        gain = f"{100 * (last - first):+.1f} points, standard error {100 * error:.1f}"
        lines.append(f"{training.run_dir.name:<10} held-out accuracy {first:.1%} -> {last:.1%} ({gain})")
    return lines


if __name__ == "__main__":
    sys.exit(main())

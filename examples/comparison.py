"""What the demos share: train several runs from one start, keep those that are complete, and compare them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from examples.jobs import ROOT, follow, start_training
from kdrl_mcore.config import load_config
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import METRICS_FILE, read_metrics

RANKS = {1: "one rank", 2: "two ranks"}


@dataclass(frozen=True)
class Training:
    """One training run of a comparison.

    Attributes:
        run_dir: its folder, relative to the project root; the last part is the run's name.
        overrides: the arguments of `kdrl_mcore.train`, except the run directory.
        ranks: the number of processes.
    """

    run_dir: Path
    overrides: tuple[str, ...]
    ranks: int = 1

    @property
    def name(self) -> str:
        """The run's name."""
        return self.run_dir.name

    def is_complete(self) -> bool:
        """Whether exactly this configuration was trained to its end and exported, after the student was made."""
        run_dir = ROOT / self.run_dir
        config_file, metrics = run_dir / "config.yaml", run_dir / METRICS_FILE
        if not (config_file.is_file() and metrics.is_file() and (run_dir / "hf").is_dir()):
            return False
        config = load_config([*self.overrides, f"run.dir={self.run_dir}"])
        if config_file.read_text() != OmegaConf.to_yaml(OmegaConf.structured(config)):
            return False
        is_newer = metrics.stat().st_mtime > (ROOT / str(config.student.path)).stat().st_mtime
        return is_newer and int(read_metrics(run_dir)[-1]["step"]) == config.trainer.steps


def train(trainings: Sequence[Training]) -> None:
    """Run all trainings that are not complete from the start, at the same time.

    Raises:
        KdrlError: one failed.
    """
    missing = [training for training in trainings if not training.is_complete()]
    if not missing:
        return
    for training in missing:
        shutil.rmtree(ROOT / training.run_dir, ignore_errors=True)
        steps = load_config(list(training.overrides)).trainer.steps
        print(f"training {training.name}: {steps} steps on {RANKS[training.ranks]}", flush=True)
    follow([start_training(each.name, each.run_dir, each.overrides, each.ranks) for each in missing])


def report(trainings: Sequence[Training], picture: Path) -> None:
    """Print the table of the runs and draw their curves.

    Raises:
        KdrlError: tools/report.py failed.
    """
    runs = [str(training.run_dir) for training in trainings]
    command = [sys.executable, "tools/report.py", *runs, "--main-panels", "--output", str(picture)]
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
        raise KdrlError(f"tools/report.py failed on {' '.join(runs)}; see its message above")


def outcome(trainings: Sequence[Training]) -> list[str]:
    """A line for each run and benchmark: the run's gain on the held-out problems."""
    lines = []
    for training in trainings:
        rows = [row for row in read_metrics(ROOT / training.run_dir) if "eval/accuracy" in row]
        for metric, what in _accuracies(rows[-1]).items():
            first, last, error = rows[0][metric], rows[-1][metric], rows[-1][f"{metric}_stderr"]
            gain = f"{100 * (last - first):+.1f} points, standard error {100 * error:.1f}"
            change = (
                f"{first:.1%} -> {last:.1%} ({gain})" if len(rows) > 1 else f"{last:.1%} (standard error {100 * error:.1f})"
            )
            lines.append(f"{training.name:<10} {what} {change}")
    return lines


def _accuracies(row: Mapping[str, float]) -> dict[str, str]:
    """The name of each held-out accuracy: the benchmark's if there are several."""
    found = {name: match[1] for name in row if (match := re.fullmatch(r"eval/(.+)/avg@\d+", name))}
    return found if len(found) > 1 else {"eval/accuracy": "held-out accuracy"}

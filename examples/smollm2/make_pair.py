"""Make the student and the teacher from SmolLM2-135M-Instruct, by supervised training on worked answers with this project's
trainer.

    python -m examples.smollm2.make_pair        # runs/smollm2/{start,data,student,teacher}; what exists is kept

The student is the fetched model, warmed up until it answers in the form: it gets about a third of the sums right. The teacher
is the fetched model, trained on more worked answers and at a higher rate: much better, and not perfect. Both train on two
data-parallel ranks.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from dataclasses import dataclass

import torch

from examples.jobs import ROOT, follow, start_training
from examples.smollm2.fetch import DIRECTORY, MODEL, check_extra, fetch_model
from examples.smollm2.problems import write_data
from kdrl_mcore.errors import KdrlError

RANKS = 2


@dataclass(frozen=True)
class Stage:
    """A model made by supervised training: its name, the model that it begins from, and its overrides."""

    name: str
    begins_from: str
    overrides: tuple[str, ...]


STAGES = (
    Stage("student", MODEL, ("trainer.steps=12", "trainer.seed=1")),
    Stage(
        "teacher",
        MODEL,
        (
            *("trainer.steps=30", "trainer.seed=2"),
            # Adam's first steps are as large as later ones: a higher rate needs a longer warm-up and a longer memory.
            *("optimizer.lr=3e-4", "optimizer.schedule=cosine", "optimizer.warmup_steps=5", "optimizer.adam_beta2=0.99"),
        ),
    ),
)


def main() -> int:
    """Make the pair unless it exists; returns the exit code, not 0 with one line if a step fails."""
    argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct, and make a student and a teacher of it.").parse_args()
    try:
        make_pair()
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_pair() -> None:
    """Write {start,data,student,teacher} in `DIRECTORY`; keep what exists.

    Raises:
        KdrlError: the model cannot be fetched, or a training run failed.
    """
    check_extra()
    fetch_model(ROOT / DIRECTORY / MODEL)
    data = ROOT / DIRECTORY / "data"
    if not data.is_dir():
        print(f"writing {DIRECTORY / 'data'}", flush=True)
        unfinished = data.with_name("data.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_data(unfinished)
        unfinished.rename(data)
    for stage in STAGES:
        if not (ROOT / DIRECTORY / stage.name).is_dir():
            _make(stage)


def _make(stage: Stage) -> None:
    """Train a model; its folder appears only once it is complete."""
    started, run_dir = time.monotonic(), DIRECTORY / f"sft_{stage.name}"
    print(f"training the {stage.name} on worked answers, from {stage.begins_from}", flush=True)
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    overrides = ["experiment=smollm2_sft", f"student.path={DIRECTORY}/{stage.begins_from}", *stage.overrides]
    follow([start_training(stage.name, run_dir, [*overrides, f"model.dtype={faster_dtype()}"], RANKS)])
    (ROOT / run_dir / "hf").rename(ROOT / DIRECTORY / stage.name)
    print(f"made the {stage.name} in {time.monotonic() - started:.0f} s", flush=True)


def faster_dtype() -> str:
    """The dtype in which this machine multiplies matrices faster. CPUs without instructions for bfloat16 are several times
    slower in it."""
    seconds = {}
    for name in ("float32", "bfloat16"):
        x_TH, w_FH = (torch.ones(rows, 576, dtype=getattr(torch, name)) for rows in (512, 1536))
        rounds = []
        for _ in range(4):
            started = time.perf_counter()
            x_TH @ w_FH.T
            rounds.append(time.perf_counter() - started)
        seconds[name] = min(rounds)
    return min(seconds, key=lambda name: seconds[name])


if __name__ == "__main__":
    sys.exit(main())

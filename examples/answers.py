"""A teacher's answers to training problems, for supervised fine-tuning on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from examples.jobs import ROOT, follow, start_training
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.rollout.files import read_rollouts


def write_answers(output: Path, run_dir: Path, problems: int, prompts_per_step: int, overrides: Sequence[str]) -> None:
    """Write one answer to each of the first training problems unless `output` exists. The answers are the rollouts of a run in
    which the teacher is the student and learns nothing. Answers that reached the length limit are left out.

    Args:
        output: the JSONL file, with `prompt`, `answer` and `response`.
        run_dir: the directory of that run, relative to the project root.
        problems, prompts_per_step: the number of answers, and how many are sampled at a time.
        overrides: the experiment, and the teacher as the student.

    Raises:
        KdrlError: the run failed.
    """
    if output.is_file():
        return
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    settings = [
        *(*overrides, "objective=grpo", "objective.alpha.init=0", "optimizer.lr=0", "trainer.self_test=false", "eval.every=-1"),
        *("eval.at_start=false", f"trainer.steps={-(-problems // prompts_per_step)}"),
        *(f"rollout.prompts_per_step={prompts_per_step}", "rollout.responses_per_prompt=1"),
        *("checkpoint.every=-1", "checkpoint.export_hf=false"),
    ]
    follow([start_training(run_dir.name, run_dir, settings)])
    rollouts = [rollout for file in sorted((ROOT / run_dir / "rollouts").iterdir()) for rollout in read_rollouts(file)]
    rows = {
        r.prompt: {"prompt": r.prompt, "answer": r.answer, "response": r.response}
        for r in rollouts
        if r.finish_reason == "stop"
    }
    write_file(output, "".join(json.dumps(row) + "\n" for row in rows.values()))

"""Make what the tiny studies (`conf/experiments/`) need beside the pair: the teacher's answers, other teachers and students.

    python examples/tiny/make_family.py [answers] [teacher] [student]      (default: all; what exists is kept)

- `data/teacher_answers.jsonl`: one answer of the teacher to each training problem, right or wrong, for SFT.
- `teacher_weak` (half of the training) and `teacher_strong` (trained on correct answers).
- `student_small` and `student_large` (half and twice as wide), stopped where their accuracy is nearest to the student's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from examples.tiny.jobs import ROOT, follow, start_training
from examples.tiny.make_pair import DEFAULT_DIR, VARIANTS, make_models, make_pair
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.rollout.files import read_rollouts

ANSWERS = "teacher_answers"
PARTS = ("answers", "teacher", "student")
PROMPTS_PER_STEP = 800


def main() -> int:
    """Make the parts asked for; exit code 1 with one line when a step fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of: {', '.join(PARTS)} (default: all)")
    parts = parser.parse_args().parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    try:
        make_pair(DEFAULT_DIR)
        if "answers" in parts:
            make_answers(DEFAULT_DIR)
        make_models([name for name in VARIANTS if name.split("_")[0] in parts], DEFAULT_DIR)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_answers(directory: Path) -> None:
    """Let the teacher answer every training problem once: a run in which it is the student and learns nothing."""
    output, run_dir = ROOT / directory / "data" / f"{ANSWERS}.jsonl", directory / ANSWERS
    if output.is_file():
        return
    problems = sum(1 for _ in (ROOT / directory / "data" / "train.jsonl").open())
    shutil.rmtree(ROOT / run_dir, ignore_errors=True)
    overrides = [
        *("experiment=tiny_cpu", "objective=grpo", "objective.alpha.init=0", "optimizer.lr=0", "trainer.self_test=false"),
        *(f"student.path={directory}/teacher", f"data.train={directory}/data/train.jsonl", "eval.every=-1"),
        *(f"trainer.steps={-(-problems // PROMPTS_PER_STEP)}", f"rollout.prompts_per_step={PROMPTS_PER_STEP}"),
        *("rollout.responses_per_prompt=1", "checkpoint.every=-1", "checkpoint.export_hf=false"),
    ]
    follow([start_training(ANSWERS, run_dir, overrides)])
    rollouts = [rollout for file in sorted((ROOT / run_dir / "rollouts").iterdir()) for rollout in read_rollouts(file)]
    rows = {
        r.prompt: {"prompt": r.prompt, "answer": r.answer, "response": r.response}
        for r in rollouts
        if r.finish_reason == "stop"
    }
    output.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

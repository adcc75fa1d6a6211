"""Make what the tiny studies (`conf/study/`) need in addition to the pair: the teacher's answers, other teachers and students.

    python examples/tiny/make_family.py [answers] [teacher] [student] [--task sparse]      (default: all; what exists is kept)

- `data/teacher_answers.jsonl`: one answer of the teacher to each training problem, right or wrong, for SFT.
- `teacher_weak` (half of the training) and `teacher_strong` (trained on correct answers).
- `student_small` and `student_large` (half and twice as wide), stopped at the accuracy nearest to the student's.
"""

from __future__ import annotations

import argparse
import sys

from examples.answers import write_answers
from examples.jobs import ROOT
from examples.tiny.make_pair import TASKS, VARIANTS, Task, make_models, make_pair
from kdrl_mcore.errors import KdrlError

ANSWERS = "teacher_answers"
PARTS = ("answers", "teacher", "student")
PROMPTS_PER_STEP = 800


def main() -> int:
    """Make the requested parts; returns the exit code, 1 with one line if a step fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--task", choices=TASKS, default="sums", help="whose family (default: %(default)s)")
    arguments = parser.parse_args()
    parts, task = arguments.parts or PARTS, TASKS[arguments.task]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
    try:
        make_pair(task.directory, task)
        if "answers" in parts:
            make_answers(task)
        make_models([name for name in VARIANTS if name.split("_")[0] in parts], task.directory, task)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_answers(task: Task) -> None:
    """Let the teacher answer every training problem once."""
    directory = task.directory
    train = directory / "data" / "train.jsonl"
    with (ROOT / train).open() as lines:
        problems = sum(1 for _ in lines)
    teacher = ["experiment=tiny_cpu", f"student.path={directory}/teacher", f"data.train={train}", *task.overrides]
    write_answers(ROOT / directory / "data" / f"{ANSWERS}.jsonl", directory / ANSWERS, problems, PROMPTS_PER_STEP, teacher)


if __name__ == "__main__":
    sys.exit(main())

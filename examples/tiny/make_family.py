"""Make what the tiny studies (`conf/study/`) need in addition to the pair: the teacher's answers, other teachers and students.

    python examples/tiny/make_family.py [answers] [teacher] [student]      (default: all; what exists is kept)

- `data/teacher_answers.jsonl`: one answer of the teacher to each training problem, right or wrong, for SFT.
- `teacher_weak` (half of the training) and `teacher_strong` (trained on correct answers).
- `student_small` and `student_large` (half and twice as wide), stopped at the accuracy nearest to the student's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from examples.answers import write_answers
from examples.jobs import ROOT
from examples.tiny.make_pair import DEFAULT_DIR, VARIANTS, make_models, make_pair
from kdrl_mcore.errors import KdrlError

ANSWERS = "teacher_answers"
PARTS = ("answers", "teacher", "student")
PROMPTS_PER_STEP = 800


def main() -> int:
    """Make the requested parts; returns the exit code, 1 with one line if a step fails."""
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
    """Let the teacher answer every training problem once."""
    train = directory / "data" / "train.jsonl"
    with (ROOT / train).open() as lines:
        problems = sum(1 for _ in lines)
    teacher = ["experiment=tiny_cpu", f"student.path={directory}/teacher", f"data.train={train}"]
    write_answers(ROOT / directory / "data" / f"{ANSWERS}.jsonl", directory / ANSWERS, problems, PROMPTS_PER_STEP, teacher)


if __name__ == "__main__":
    sys.exit(main())

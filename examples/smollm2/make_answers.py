"""Let the teacher answer training problems once each, for the method `sft` of `kdrl-study main base=smollm2`.

python -m examples.smollm2.make_answers
"""

from __future__ import annotations

import argparse
import sys

from examples.answers import write_answers
from examples.jobs import ROOT
from examples.smollm2.fetch import DIRECTORY
from examples.smollm2.make_pair import make_pair
from kdrl_mcore.errors import KdrlError

ANSWERS = "teacher_answers"
PROBLEMS, PROMPTS_PER_STEP = 768, 96
"""As many answers as the other methods sample in 24 steps."""


def main() -> int:
    """Make the pair and the answers unless they exist; returns the exit code, not 0 with one line if a step fails."""
    argparse.ArgumentParser(description="Let the teacher answer training problems, for supervised fine-tuning.").parse_args()
    try:
        make_pair()
        teacher = ["experiment=smollm2", f"student.path={DIRECTORY}/teacher"]
        output = ROOT / DIRECTORY / "data" / f"{ANSWERS}.jsonl"
        write_answers(output, DIRECTORY / ANSWERS, PROBLEMS, PROMPTS_PER_STEP, teacher)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

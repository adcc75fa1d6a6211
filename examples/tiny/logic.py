"""The second tiny task, from another domain: evaluate a chain of logic operations, one per line, and box the last word.

    prompt      5&3^7|2=
    response    5&3=1
                1^7=6
                6|2=6
                \\boxed{6}

A digit is a word of three bits. The operations (`&` and, `|` or, `^` exclusive or) are bitwise and evaluated from left
to right. A problem has three to five words; distinct problems are drawn and split into sets, so no two sets share a problem.
The answer is compared as text (`reward=exact_match`).

The teacher learns from flawed worked answers: it has mostly learnt that the last bit of `1^1` is 1. Its mistakes are
systematic, like those of the first task's teacher: only the reward reveals them.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

from examples.tiny.task import TEACHER_SET, write_rows

WORDS = range(8)
MIN_WORDS, MAX_WORDS = 3, 5
SPLITS: dict[str, int] = {"eval": 400, "validation": 200, "train": 8000, "sft": 24000}
"""The number of problems in each set."""
_APPLY = {"&": int.__and__, "|": int.__or__, "^": int.__xor__}


@dataclass(frozen=True)
class Problem:
    """Words of three bits, and the operations between them."""

    words: tuple[int, ...]
    operations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The problem as text, such as `5&3^7=`."""
        chain = zip(self.operations, self.words[1:], strict=True)
        return str(self.words[0]) + "".join(f"{operation}{word}" for operation, word in chain) + "="

    @property
    def answer(self) -> str:
        """The last word as text."""
        total = self.words[0]
        for operation, word in zip(self.operations, self.words[1:], strict=True):
            total = _APPLY[operation](total, word)
        return str(total)


def worked_answer(problem: Problem, flaw_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """The response: one operation per line, then the boxed word.

    With `flaw_rate` > 0, the last bit of an exclusive or of two words that both end in 1 comes out as 1 with that probability
    (drawn from `rng`); the following lines continue from the wrong word.
    """
    total, lines = problem.words[0], []
    for operation, word in zip(problem.operations, problem.words[1:], strict=True):
        flawed = rng is not None and operation == "^" and total & word & 1 and rng.random() < flaw_rate
        result = _APPLY[operation](total, word) | bool(flawed)
        lines.append(f"{total}{operation}{word}={result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def make_splits(seed: int = 0) -> dict[str, list[Problem]]:
    """The sets of `SPLITS`, drawn without repetition: the same seed gives the same sets, and no two sets share a problem."""
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < sum(SPLITS.values()):
        words = tuple(rng.choice(WORDS) for _ in range(rng.randint(MIN_WORDS, MAX_WORDS)))
        problems[Problem(words, tuple(rng.choice("&|^") for _ in words[1:]))] = None
    shuffled = list(problems)
    rng.shuffle(shuffled)  # the short ones run out first
    remaining = iter(shuffled)
    return {name: list(itertools.islice(remaining, size)) for name, size in SPLITS.items()}


def write_data(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """Write each set as `NAME.jsonl`: `prompt` and `answer`, and for the supervised sets the worked `response`."""
    splits, rng = make_splits(seed), random.Random(seed)
    for name in ("train", "validation", "eval"):
        write_rows(directory / f"{name}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits[name]))
    for name, rate in (("sft", 0.0), (TEACHER_SET, flaw_rate)):
        rows = ({"prompt": p.prompt, "answer": p.answer, "response": worked_answer(p, rate, rng)} for p in splits["sft"])
        write_rows(directory / f"{name}.jsonl", rows)

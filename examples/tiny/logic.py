"""The second tiny task, from another domain: combine words of four bits, one operation a line, and box the last word.

    prompt      1011&1101^0111|0001=
    response    1011&1101=1001
                1001^0111=1110
                1110|0001=1111
                \\boxed{1111}

Operations (`&` and, `|` or, `^` exclusive or) go from left to right. A problem holds two to four words, so there are 1.8
million of them; as many as the sets need are drawn, each once, and cut into sets that cannot share a problem. The answer is
text, not a number (`0110` is not `110`): `reward=exact_match` checks it.

The teacher learns from flawed worked answers: it has mostly learnt that the last bit of `1^1` is 1. Its mistakes are
systematic, as those of the first task's teacher are: only the reward can tell.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

from examples.tiny.task import TEACHER_SET, write_rows

WORD_BITS = 4
MIN_WORDS, MAX_WORDS = 2, 4
SPLITS: dict[str, int] = {"eval": 400, "validation": 200, "train": 8000, "sft": 24000}
"""Problems in each set."""
_APPLY = {"&": int.__and__, "|": int.__or__, "^": int.__xor__}


@dataclass(frozen=True)
class Problem:
    """Words of bits, and the operations between them."""

    words: tuple[int, ...]
    operations: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The problem as text, such as `1011&1101^0111=`."""
        first, *rest = map(bits, self.words)
        return first + "".join(map("".join, zip(self.operations, rest, strict=True))) + "="

    @property
    def answer(self) -> str:
        """The last word as text."""
        total = self.words[0]
        for operation, word in zip(self.operations, self.words[1:], strict=True):
            total = _APPLY[operation](total, word)
        return bits(total)


def bits(word: int) -> str:
    """A word as text, such as `0110`."""
    return f"{word:0{WORD_BITS}b}"


def worked_answer(problem: Problem, flaw_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """The response: each operation on a line, then the boxed word.

    With `flaw_rate` > 0, the last bit of an exclusive or of two words that both end in 1 comes out as 1 with that probability
    (drawn from `rng`); the lines after it go on from the wrong word.
    """
    total, lines = problem.words[0], []
    for operation, word in zip(problem.operations, problem.words[1:], strict=True):
        flawed = rng is not None and operation == "^" and total & word & 1 and rng.random() < flaw_rate
        result = _APPLY[operation](total, word) | bool(flawed)
        lines.append(f"{bits(total)}{operation}{bits(word)}={bits(result)}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{bits(total)}}}"])


def make_splits(seed: int = 0) -> dict[str, list[Problem]]:
    """The sets of `SPLITS`, drawn without repetition: the same seed gives the same sets, no two share a problem."""
    rng = random.Random(seed)
    problems: dict[Problem, None] = {}
    while len(problems) < sum(SPLITS.values()):
        words = tuple(rng.randrange(1 << WORD_BITS) for _ in range(rng.randint(MIN_WORDS, MAX_WORDS)))
        problems[Problem(words, tuple(rng.choice("&|^") for _ in words[1:]))] = None
    remaining = iter(problems)
    return {name: list(itertools.islice(remaining, size)) for name, size in SPLITS.items()}


def write_data(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """Write each set as `NAME.jsonl`: `prompt` and `answer`, and for the supervised sets the worked `response`."""
    splits, rng = make_splits(seed), random.Random(seed)
    for name in ("train", "validation", "eval"):
        write_rows(directory / f"{name}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits[name]))
    for name, rate in (("sft", 0.0), (TEACHER_SET, flaw_rate)):
        rows = ({"prompt": p.prompt, "answer": p.answer, "response": worked_answer(p, rate, rng)} for p in splits["sft"])
        write_rows(directory / f"{name}.jsonl", rows)

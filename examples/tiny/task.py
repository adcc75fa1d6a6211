"""The tiny task: add a chain of digits, one addition per line, and box the sum.

    prompt      3+8+5+9=
    response    3+8=11
                11+5=16
                16+9=25
                \\boxed{25}

A problem has two to five digits from 1 to 9, so there are 66,420 problems; they are shuffled once and split into sets, so no
two sets share a problem. A response has at most 42 tokens (one per character, and the end of sequence).

The teacher learns from flawed worked answers (`worked_answer(..., flaw_rate=...)`): it has mostly learnt that adding 7 to
a two-digit sum across a ten lands one short. Its mistakes are systematic, like a real teacher's: copying the teacher
copies them, and only the reward reveals them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Tokenizer

MIN_DIGITS, MAX_DIGITS = 2, 5
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
FLAWED_DIGIT = 7
SPLITS: dict[str, int] = {"eval": 400, "validation": 200, "train": 8000, "sft": 24000, "tuning": 400}
"""The number of problems in each set."""
TEACHER_SET = "sft_teacher"
"""The `sft` problems once more, with flawed worked answers."""


@dataclass(frozen=True)
class Problem:
    """A chain of digits to add."""

    digits: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The problem as text, such as `3+8+5+9=`."""
        return "+".join(map(str, self.digits)) + "="

    @property
    def answer(self) -> str:
        """The sum as text."""
        return str(sum(self.digits))


def worked_answer(problem: Problem, flaw_rate: float = 0.0, rng: random.Random | None = None) -> str:
    """The response: one addition per line, then the boxed sum.

    With `flaw_rate` > 0, adding 7 to a two-digit sum and crossing a ten comes out one too small with that probability
    (drawn from `rng`); the following lines continue from the wrong sum.
    """

    def add(total: int, digit: int) -> int:
        crosses_ten = total >= 10 and total % 10 + digit >= 10
        flawed = rng is not None and digit == FLAWED_DIGIT and crosses_ten and rng.random() < flaw_rate
        return total + digit - flawed

    return steps(problem, add)


def steps(problem: Problem, add: Callable[[int, int], int]) -> str:
    """One line for each result of `add`, right or wrong, then the last in a box."""
    total, lines = problem.digits[0], []
    for digit in problem.digits[1:]:
        result = add(total, digit)
        lines.append(f"{total}+{digit}={result}")
        total = result
    return "\n".join([*lines, f"\\boxed{{{total}}}"])


def all_problems() -> Iterator[Problem]:
    """Every problem of the task, shortest first."""
    for length in range(MIN_DIGITS, MAX_DIGITS + 1):
        yield from (Problem(digits) for digits in itertools.product(range(1, 10), repeat=length))


def make_splits(seed: int = 0) -> dict[str, list[Problem]]:
    """The sets of `SPLITS`, cut from one shuffle of all problems: the same seed gives the same sets, no two share a problem."""
    problems = list(all_problems())
    random.Random(seed).shuffle(problems)
    remaining = iter(problems)
    return {name: list(itertools.islice(remaining, size)) for name, size in SPLITS.items()}


def write_data(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """Write each set as `NAME.jsonl`: `prompt` and `answer`, and for the supervised sets the worked `response`."""
    splits, rng = make_splits(seed), random.Random(seed)
    for name in ("train", "validation", "eval", "tuning"):
        write_rows(directory / f"{name}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits[name]))
    for name, rate in (("sft", 0.0), (TEACHER_SET, flaw_rate)):
        rows = ({"prompt": p.prompt, "answer": p.answer, "response": worked_answer(p, rate, rng)} for p in splits["sft"])
        write_rows(directory / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """Write a data set as JSONL, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE spells the bytes 0 to 255 (space is U+0120, newline U+010A)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def make_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with one token per byte: byte-level BPE without merges, as every reader of a Qwen2 folder rebuilds it."""
    vocabulary = {piece: index for index, piece in enumerate([*byte_alphabet(), END_OF_TEXT, PADDING])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None, eos_token=END_OF_TEXT, pad_token=PADDING)

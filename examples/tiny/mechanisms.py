"""Tasks on which reward and teacher fall short in different ways, to find out when joining them pays (docs/results.md).

| task | what falls short |
|---|---|
| `sums` (task.py) | the teacher has a systematic flaw; the reward sees it |
| `sparse` | the reward: the student has learnt to lose the ten when an addition crosses one, and is almost never right |
| `sparse_flawed` | both: that student, with the teacher of `sums` |
| `verbose` | the teacher's style: it checks every addition by a subtraction, which takes twice as many tokens |
| `domains` | the teacher in one of two domains: it adds well, and confuses `&` with `|` |
| `longer` | the training: problems are longer than those that student and teacher were trained on |

Each data set is written by a function of the same form as those of task.py and logic.py. No two sets of a task share a problem.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from examples.tiny import logic
from examples.tiny.task import TEACHER_SET, Problem, all_problems, make_splits, steps, worked_answer, write_rows

LOST_TENS = 0.95
"""How often the student of `sparse` loses the ten. With two of them in a problem, it is right on one problem in 400."""
SPARSE_SUMS = range(20, 30)
"""The sums of the problems of `sparse`: additions of digits cross exactly two tens."""
CONFUSED = 0.8
"""How often the teacher of `domains` confuses `&` with `|`."""
LONGER_DIGITS = (6, 7)
LONGER_SPLITS = {"eval": 400, "tuning": 400, "validation": 200}

Answer = Callable[[Problem, random.Random], str]


def lose_tens(problem: Problem, rng: random.Random) -> str:
    """A worked answer in which additions that cross a ten mostly lose it: 8+5=3."""

    def add(total: int, digit: int) -> int:
        lost = total % 10 + digit >= 10 and rng.random() < LOST_TENS
        return total + digit - 10 * lost

    return steps(problem, add)


def check_steps(problem: Problem, rng: random.Random) -> str:
    """A right worked answer in which a subtraction follows every addition: 3+8=11, 11-8=3."""
    *additions, boxed = worked_answer(problem).split("\n")
    lines = []
    for addition in additions:
        operands, result = addition.split("=")
        total, digit = operands.split("+")
        lines += [addition, f"{result}-{digit}={total}"]
    return "\n".join([*lines, boxed])


def right(problem: Problem, rng: random.Random) -> str:
    """A right worked answer."""
    return worked_answer(problem)


def write_sparse(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """`sparse`: the teacher's worked answers are right."""
    _write_sums(directory, _splits_of(_with_two_tens(), seed), lose_tens, right, seed)


def write_sparse_flawed(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """`sparse_flawed`: the teacher's worked answers have the flaw of `sums`."""
    _write_sums(directory, _splits_of(_with_two_tens(), seed), lose_tens, lambda p, rng: worked_answer(p, flaw_rate, rng), seed)


def write_verbose(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """`verbose`: the teacher's worked answers are right and twice as long."""
    _write_sums(directory, make_splits(seed), right, check_steps, seed)


def write_longer(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """`longer`: problems of two to five digits to learn from, six and seven digits for everything that is measured."""
    rng = random.Random(seed)
    longer: dict[Problem, None] = {}
    while len(longer) < sum(LONGER_SPLITS.values()):
        longer[Problem(tuple(rng.randint(1, 9) for _ in range(rng.choice(LONGER_DIGITS))))] = None
    remaining = iter(longer)
    held_out = {name: list(itertools.islice(remaining, size)) for name, size in LONGER_SPLITS.items()}
    short = make_splits(seed)
    # The student is chosen by its accuracy on the problems that it was trained on.
    _write_sums(directory, short | held_out | {"validation": short["validation"]}, right, right, seed)


def write_domains(directory: Path, flaw_rate: float, seed: int = 0) -> None:
    """`domains`: half sums, half logic, with the column `domain`; `eval_sums` and `eval_logic` are the halves of `eval`."""
    rng = random.Random(seed)
    sums, chains = make_splits(seed), logic.make_splits(seed)
    chains["tuning"] = chains["sft"][-400:]  # the logic task has no such set
    chains["sft"] = chains["sft"][:-400]
    for name in ("train", "validation", "eval", "tuning"):
        half = len(sums[name]) // 2
        rows = [_row(p, "sums") for p in sums[name][:half]] + [_row(p, "logic") for p in chains[name][:half]]
        rng.shuffle(rows)
        write_rows(directory / f"{name}.jsonl", iter(rows))
    for domain, problems in (("sums", sums["eval"]), ("logic", chains["eval"])):
        write_rows(directory / f"eval_{domain}.jsonl", (_row(p, domain) for p in problems[: len(problems) // 2]))
    half = len(chains["sft"]) // 2
    for name, confused in (("sft", False), (TEACHER_SET, True)):
        rows = [_row(p, "sums") | {"response": worked_answer(p)} for p in sums["sft"][:half]]
        for p in chains["sft"][:half]:
            taught = _confuse(p, rng) if confused else p
            rows.append(_row(p, "logic") | {"response": _as_asked(logic.worked_answer(taught), taught, p)})
        rng.shuffle(rows)
        write_rows(directory / f"{name}.jsonl", iter(rows))


def _confuse(problem: logic.Problem, rng: random.Random) -> logic.Problem:
    """The problem as the teacher of `domains` mostly solves it: with `&` and `|` exchanged."""
    exchanged = {"&": "|", "|": "&", "^": "^"}
    operations = tuple(exchanged[o] if rng.random() < CONFUSED else o for o in problem.operations)
    return logic.Problem(problem.words, operations)


def _as_asked(answer: str, solved: logic.Problem, asked: logic.Problem) -> str:
    """A worked answer to `solved`, with the operations that were asked for."""
    *lines, boxed = answer.split("\n")
    pairs = zip(lines, solved.operations, asked.operations, strict=True)
    return "\n".join([*(line.replace(was, wanted) for line, was, wanted in pairs), boxed])


def _row(problem: Problem | logic.Problem, domain: str) -> dict[str, str]:
    return {"prompt": problem.prompt, "answer": problem.answer, "domain": domain}


def _with_two_tens() -> Iterable[Problem]:
    return (problem for problem in all_problems() if sum(problem.digits) in SPARSE_SUMS)


def _splits_of(problems: Iterable[Problem], seed: int) -> dict[str, list[Problem]]:
    """The sets of `make_splits`, from these problems alone; the supervised set has what the others leave."""
    shuffled = list(problems)
    random.Random(seed).shuffle(shuffled)
    remaining = iter(shuffled)
    sizes = {"eval": 400, "validation": 200, "train": 8000, "tuning": 400, "sft": len(shuffled)}
    return {name: list(itertools.islice(remaining, size)) for name, size in sizes.items()}


def _write_sums(directory: Path, splits: Mapping[str, Sequence[Problem]], student: Answer, teacher: Answer, seed: int) -> None:
    rng = random.Random(seed)
    for name in ("train", "validation", "eval", "tuning"):
        write_rows(directory / f"{name}.jsonl", ({"prompt": p.prompt, "answer": p.answer} for p in splits[name]))
    for name, answer in (("sft", student), (TEACHER_SET, teacher)):
        rows = ({"prompt": p.prompt, "answer": p.answer, "response": answer(p, rng)} for p in splits["sft"])
        write_rows(directory / f"{name}.jsonl", rows)

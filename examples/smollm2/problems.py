"""Two domains of problems from `reasoning-gym`, with our own short worked answers.

`purse`, arithmetic in words (the sums are those of `chain_sum`):

    prompt      Ann has 7 coins, gets 5, loses 3 and gets 8. How many coins does Ann have now?
    response    7+5=12
                12-3=9
                9+8=17
                \\boxed{17}

`knights`, logic (`knights_knaves`); every assignment is tried in turn until one fits:

    prompt      A very special island is inhabited only by heros and villains. Heros always tell the truth, and villains always
                lie. You meet 2 inhabitants: Amelia, and Elizabeth. As Amelia put it, "Elizabeth is a hero". Elizabeth
                remarked, "if Amelia is a hero then Elizabeth is a villain". Who is what?
    response    hero, hero: no
                hero, villain: no
                villain, hero: yes
                \\boxed{villain, hero}

No two sets share a problem. Problems are compared by content: by the sum, whoever has whatever; by what the two inhabitants
say, whatever their names.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any

from kdrl_mcore.resilience.files import write_file

SEED = 0
SPLITS: Mapping[str, Mapping[str, int]] = {
    "purse": {"eval": 200, "validation": 100, "train": 2000, "sft": 2000},
    "knights": {"eval": 100, "validation": 40, "sft": 600},
}
"""The number of problems in each set of a domain. `knights` is only warmed up and evaluated."""


NAMES = ("Ann", "Ben", "Eva", "Jim", "Kim", "Leo", "Max", "Mia", "Sam", "Tom")
THINGS = ("apples", "books", "cards", "coins", "cups", "eggs", "keys", "pens", "shells", "stamps")


@dataclass(frozen=True)
class Problem:
    """A problem with its answer and a worked answer; problems with the same content are the same."""

    prompt: str
    answer: str
    worked: str
    content: Hashable


def write_data(directory: Path) -> None:
    """Write each set as `directory/DOMAIN_SET.jsonl`: `prompt` and `answer`, and `response`, the worked answer, for `sft`."""
    for domain, sets in make_sets().items():
        for name, problems in sets.items():
            rows = [
                {"prompt": each.prompt, "answer": each.answer} | ({"response": each.worked} if name == "sft" else {})
                for each in problems
            ]
            write_file(directory / f"{domain}_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_sets() -> dict[str, dict[str, list[Problem]]]:
    """The sets of each domain: the same ones every time, and no two of them share a problem's content."""
    purse = distinct(purse_problems())
    return {
        "purse": {name: list(islice(purse, size)) for name, size in SPLITS["purse"].items()},
        "knights": _split_by_content(list(islice(knight_problems(), 3000)), SPLITS["knights"]),
    }


def distinct(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems without repetitions of the same content."""
    seen: set[Hashable] = set()
    for problem in problems:
        if problem.content not in seen:
            seen.add(problem.content)
            yield problem


def _split_by_content(problems: Sequence[Problem], sizes: Mapping[str, int]) -> dict[str, list[Problem]]:
    """Sets that share no content, although a set may have the same content with several names: there are only about 400
    puzzles. The last set gets the contents that the others leave."""
    groups: dict[Hashable, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.content, []).append(problem)
    contents = iter(groups.values())
    *held_out, last = sizes
    sets = {name: [group[0] for group in islice(contents, sizes[name])] for name in held_out}
    rest = [problem for group in contents for problem in group]
    random.Random(SEED).shuffle(rest)
    return {**sets, last: rest[: sizes[last]]}


def purse_problems() -> Iterator[Problem]:
    """Sums of `chain_sum` with three or four one-digit numbers as a story; sums that fall below zero are left out."""
    from reasoning_gym import create_dataset

    rng = random.Random(SEED)
    settings = {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 1}
    for entry in create_dataset("chain_sum", seed=SEED, size=20_000, **settings):
        first, *rest = re.findall(r"[+-]?\d+", entry["metadata"]["expression"].replace(" ", ""))
        changes = [int(change) for change in rest]
        if 0 in changes or min(accumulate(changes, initial=int(first))) < 0:
            continue
        *early, last = (f"{'gets' if change > 0 else 'loses'} {abs(change)}" for change in changes)
        who, what = rng.choice(NAMES), rng.choice(THINGS)
        yield Problem(
            prompt=f"{', '.join([f'{who} has {first} {what}', *early])} and {last}. How many {what} does {who} have now?",
            answer=entry["answer"],
            worked=worked_sum(int(first), changes),
            content=(int(first), *changes),
        )


def worked_sum(first: int, changes: Sequence[int]) -> str:
    """The response: a line for each change, then the box."""
    totals = list(accumulate(changes, initial=first))
    lines = [f"{before}{change:+}={after}" for before, change, after in zip(totals, changes, totals[1:], strict=False)]
    return "\n".join([*lines, f"\\boxed{{{totals[-1]}}}"])


def knight_problems() -> Iterator[Problem]:
    """Problems of `knights_knaves` with two inhabitants; the instructions for the format of the answer are left out."""
    from reasoning_gym import create_dataset

    for entry in create_dataset("knights_knaves", seed=SEED, size=10_000, n_people=2, depth_constraint=2, width_constraint=2):
        known = entry["metadata"]
        story, _, _ = entry["question"].partition(" So who is ")
        worked = worked_knights(known["statements"], known["knight_knave_terms"])
        yield Problem(
            prompt=f"{story} Who is what?",
            answer=_names(known["solution"], known["knight_knave_terms"]),
            worked=worked,
            content=known["statements"],
        )


def worked_knights(statements: Sequence[Any], terms: Mapping[str, Any]) -> str:
    """The response: each assignment of the inhabitants in turn, until one fits what they say, then the box."""
    lines = []
    for honest in product((True, False), repeat=len(statements)):
        fits = all(is_true(statement, honest) == speaks for statement, speaks in zip(statements, honest, strict=True))
        lines.append(f"{_names(honest, terms)}: {'yes' if fits else 'no'}")
        if fits:
            return "\n".join([*lines, f"\\boxed{{{_names(honest, terms)}}}"])
    raise ValueError(f"nobody can say {statements}")


def is_true(statement: Any, honest: Sequence[bool]) -> bool:
    """Whether a statement of `knights_knaves` is true, if `honest` says who tells the truth."""
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return honest[parts[0]] == (kind == "telling-truth")
    values = [is_true(part, honest) for part in parts]
    return {
        "not": lambda: not values[0],
        "and": lambda: all(values),
        "or": lambda: any(values),
        "->": lambda: not values[0] or values[1],
        "<=>": lambda: values[0] == values[1],
    }[kind]()


def _names(honest: Sequence[bool], terms: Mapping[str, Any]) -> str:
    return ", ".join(str(terms["knight" if each else "knave"]) for each in honest)

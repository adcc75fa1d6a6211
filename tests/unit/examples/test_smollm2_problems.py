"""The problems of examples/smollm2 have right answers that the verifiers accept, and no problem is in two sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("reasoning_gym", reason="the extra `smollm2` is not installed")

from examples.smollm2.problems import (
    SPLITS,
    Problem,
    is_true,
    knight_problems,
    make_sets,
    worked_knights,
    worked_sum,
    write_data,
)
from kdrl_mcore.config import RewardConfig, load_benchmark, load_config
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.types import Rollout

Sets = dict[str, dict[str, list[Problem]]]


@pytest.fixture(scope="module")
def sets() -> Sets:
    return make_sets()


def all_of(sets: Sets, domain: str) -> Iterator[tuple[str, Problem]]:
    return ((name, problem) for name, problems in sets[domain].items() for problem in problems)


def test_the_sets_have_their_sizes_and_come_out_the_same_again(sets: Sets) -> None:
    assert {domain: {name: len(each) for name, each in own.items()} for domain, own in sets.items()} == SPLITS
    assert make_sets() == sets


@pytest.mark.parametrize("domain", SPLITS)
def test_no_two_sets_share_a_problem_by_content(sets: Sets, domain: str) -> None:
    """They are compared by what is in the text, not by the key that split the sets."""
    contents: dict[str, set[object]] = {}
    for name, problem in all_of(sets, domain):
        if domain == "purse":  # compares only the numbers and what happens to them
            contents.setdefault(name, set()).add(tuple(re.findall(r"has \d|gets \d|loses \d", problem.prompt)))
        else:  # the story with names and kinds made equal
            story = problem.prompt
            kinds = re.findall(r"only by (\w+)s and (\w+)s\.", story)[0]
            people = re.findall(r"inhabitants: (\w+), and (\w+)\.", story)[0]
            for word, plain in zip((*kinds, *people), ("K", "N", "A", "B"), strict=True):
                story = re.sub(rf"\b(an? )?{word}", plain, story)
            contents.setdefault(name, set()).add(story)
    names = list(contents)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert not contents[name] & contents[other], (name, other)


def verdicts(problems: list[Problem], kind: str, response: str | None = None) -> list[bool]:
    ids, log_probs = np.zeros(1, np.int64), np.zeros(1, np.float32)
    rollouts = [
        Rollout(
            "p", 0, ids, ids, log_probs, "stop", 0, response=each.worked if response is None else response, answer=each.answer
        )
        for each in problems
    ]
    with Verifier(RewardConfig(kind=kind, workers=1)) as verifier:
        verifier.score(rollouts)
    return [each.correct for each in rollouts]


@pytest.mark.parametrize("domain", SPLITS)
def test_the_verifier_accepts_every_worked_answer_and_nothing_else(sets: Sets, domain: str) -> None:
    kind = {"purse": load_config(["experiment=smollm2"]).reward.kind, "knights": load_benchmark("smollm2_knights").reward}
    problems = [problem for _, problem in all_of(sets, domain)]
    assert all(verdicts(problems, str(kind[domain])))
    wrong = {"purse": "\\boxed{-1}", "knights": "\\boxed{knight}"}[domain]
    assert not any(verdicts(problems, str(kind[domain]), wrong))
    lines = {
        "purse": r"(\d+[+-]\d=\d+\n){2,3}\\boxed\{\d+\}",
        "knights": r"([\w, ]+: no\n){0,3}[\w, ]+: yes\n\\boxed\{[\w, ]+\}",
    }
    assert all(re.fullmatch(lines[domain], problem.worked) for problem in problems)


def test_every_line_of_a_sum_is_right_and_tells_the_story(sets: Sets) -> None:
    for _, problem in all_of(sets, "purse"):
        *steps, box = problem.worked.split("\n")
        total = int(re.findall(r"has (\d)", problem.prompt)[0])
        for step, (verb, number) in zip(steps, re.findall(r"(gets|loses) (\d)", problem.prompt), strict=True):
            after = total + int(number) * (1 if verb == "gets" else -1)
            assert step == f"{total}{'+' if verb == 'gets' else '-'}{number}={after}" and after >= 0
            total = after
        assert box == f"\\boxed{{{total}}}" and problem.answer == str(total)


def test_a_puzzle_has_the_one_solution_that_the_generator_gives() -> None:
    for problem, _ in zip(knight_problems(), range(200), strict=False):
        assert problem.worked.endswith(f"\\boxed{{{problem.answer}}}")
        fitting = [
            honest
            for honest in product((True, False), repeat=2)
            if tuple(is_true(statement, honest) for statement in problem.content) == honest  # type: ignore[attr-defined]
        ]
        assert len(fitting) == 1


def test_worked_answers_read_as_the_page_says() -> None:
    assert worked_sum(7, [5, -3, 8]) == "7+5=12\n12-3=9\n9+8=17\n\\boxed{17}"
    statements = (("not", ("telling-truth", 1)), ("or", ("telling-truth", 0), ("->", ("telling-truth", 1), ("lying", 0))))
    assert worked_knights(statements, {"knight": "hero", "knave": "villain"}) == (
        "hero, hero: no\nhero, villain: no\nvillain, hero: yes\n\\boxed{villain, hero}"
    )


def test_the_files_are_what_the_experiments_read(sets: Sets, tmp_path: Path) -> None:
    write_data(tmp_path)
    sft, kdrl = load_config(["experiment=smollm2_sft"]), load_config(["experiment=smollm2"])
    sources = [source.path for source in sft.data.sources]
    for path in (*sources, kdrl.data.train, kdrl.data.eval, load_benchmark("smollm2_knights").source):
        rows = [json.loads(line) for line in (tmp_path / Path(str(path)).name).read_text().splitlines()]
        assert rows and all({"prompt", "answer"} <= row.keys() for row in rows)
        assert all("response" in row for row in rows) == (path in sources)

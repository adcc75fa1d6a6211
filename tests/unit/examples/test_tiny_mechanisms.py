"""The tasks on which reward and teacher fall short in different ways."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from examples.tiny.make_pair import FLAW_RATE, TASKS
from examples.tiny.task import END_OF_TEXT, TEACHER_SET, make_tokenizer
from kdrl_mcore.config import load_config

MEASURED = ("train", "validation", "eval", "tuning")
NamedSets = tuple[str, dict[str, list[dict[str, Any]]]]
NAMES = ("sparse", "sparse_flawed", "verbose", "domains", "longer")


@pytest.fixture(scope="module", params=NAMES)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NamedSets:
    """A task's name and its data sets."""
    folder = tmp_path_factory.mktemp(request.param)
    TASKS[request.param].write_data(folder, FLAW_RATE, 0)
    return request.param, {file.stem: [json.loads(line) for line in file.open()] for file in folder.iterdir()}


def right(row: dict[str, Any]) -> bool:
    return bool(row["response"].endswith("\\boxed{" + row["answer"] + "}"))


def share_right(rows: list[dict[str, Any]]) -> float:
    return sum(map(right, rows)) / len(rows)


def test_no_problem_is_in_two_sets(task: NamedSets) -> None:
    _, sets = task
    prompts = [row["prompt"] for name in (*MEASURED, "sft") for row in sets[name]]
    assert len(prompts) == len(set(prompts))
    assert {len(sets[name]) for name in ("eval", "tuning")} == {400} and len(sets["train"]) == 8000
    assert [row["prompt"] for row in sets["sft"]] != [] and len(sets["sft"]) == len(sets[TEACHER_SET]) >= 23_000


def test_answers_are_right_and_responses_fit(task: NamedSets) -> None:
    name, sets = task
    for row in sets["eval"] + sets["sft"][:500]:
        digits, operations = re.findall(r"\d", row["prompt"]), re.findall(r"[+&|^]", row["prompt"])
        total = int(digits[0])
        for operation, digit in zip(operations, map(int, digits[1:]), strict=True):
            total = {"+": total + digit, "&": total & digit, "|": total | digit, "^": total ^ digit}[operation]
        assert row["answer"] == str(total)
    tokenizer = make_tokenizer()
    longest = max(len(tokenizer.encode(row["response"] + END_OF_TEXT)) for row in sets["sft"] + sets[TEACHER_SET])
    assert longest <= load_config(["experiment=tiny_cpu", *TASKS[name].overrides]).rollout.max_response_tokens


def test_student_and_teacher_fall_short_as_the_task_says(task: NamedSets) -> None:
    name, sets = task
    student, teacher = share_right(sets["sft"]), share_right(sets[TEACHER_SET])
    if name in ("sparse", "sparse_flawed"):
        assert 0.001 < student < 0.01  # so seldom that most groups of samples have no reward
        assert teacher == 1 if name == "sparse" else 0.8 < teacher < 0.95
    elif name == "domains":
        by_domain = {d: share_right([row for row in sets[TEACHER_SET] if row["domain"] == d]) for d in ("sums", "logic")}
        assert student == by_domain["sums"] == 1 and by_domain["logic"] < 0.5
        assert {row["domain"] for row in sets["eval_sums"]} == {"sums"} and len(sets["eval_logic"]) == 200
    else:
        assert student == teacher == 1
    if name == "verbose":
        lengths = [sum(len(row["response"]) for row in sets[which]) for which in ("sft", TEACHER_SET)]
        assert 1.6 < lengths[1] / lengths[0] < 2
        assert "8+3=11\n11-3=8\n" in "".join(row["response"] + "\n" for row in sets[TEACHER_SET])
    if name == "longer":
        digits = {which: {len(row["prompt"]) // 2 for row in sets[which]} for which in (*MEASURED, "sft")}
        assert digits["eval"] == digits["tuning"] == {6, 7} and digits["train"] == digits["sft"] == {2, 3, 4, 5}

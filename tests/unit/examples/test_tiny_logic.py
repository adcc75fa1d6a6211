"""The second tiny task has right answers, a teacher with one flaw and no shared problems, and KDRL trains on it."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from examples.tiny import logic
from examples.tiny.logic import SPLITS, Problem, make_splits, worked_answer, write_data
from examples.tiny.make_pair import TASKS, write_random_model
from examples.tiny.task import END_OF_TEXT, TEACHER_SET, make_tokenizer
from kdrl_mcore.config import load_config
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank

FLAW_RATE = 0.8


def by_bits(left: int, operation: str, right: int) -> int:
    """The operation bit by bit, from its truth table."""
    table = {"&": {(1, 1)}, "|": {(0, 1), (1, 0), (1, 1)}, "^": {(0, 1), (1, 0)}}[operation]
    return sum(((left >> bit & 1, right >> bit & 1) in table) << bit for bit in range(3))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logic")
    write_data(directory, FLAW_RATE)
    return directory


def rows(data: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


def test_no_problem_is_in_two_sets_and_every_answer_is_right(data: Path) -> None:
    taken = [row for name in SPLITS for row in rows(data, name)]
    assert len({row["prompt"] for row in taken}) == len(taken) == sum(SPLITS.values())
    for row in taken:
        total, *rest = re.findall(r"[&|^]?\d", row["prompt"])
        value = int(total)
        for part in rest:
            value = by_bits(value, part[0], int(part[1]))
        assert row["answer"] == str(value)


def test_the_teachers_mistakes_are_of_one_kind_and_in_the_wanted_share(data: Path) -> None:
    taught = rows(data, TEACHER_SET)
    assert [row["prompt"] for row in taught] == [row["prompt"] for row in rows(data, "sft")]
    wrong = sum(f"boxed{{{row['answer']}}}" not in row["response"] for row in taught)
    assert 0.82 < 1 - wrong / len(taught) < 0.93
    for row in taught:
        for line in row["response"].split("\n")[:-1]:
            left, operation, right, result = re.fullmatch(r"(\d)([&|^])(\d)=(\d)", line).groups()  # type: ignore[union-attr]
            right_result = by_bits(int(left), operation, int(right))
            may_be_flawed = operation == "^" and int(left) % 2 == int(right) % 2 == 1
            assert int(result) == right_result or (may_be_flawed and int(result) == right_result + 1)
    for row in rows(data, "sft"):
        assert row["response"].endswith(f"\\boxed{{{row['answer']}}}")


def test_a_flaw_carries_on_and_the_same_seed_gives_the_same_sets() -> None:
    response = worked_answer(Problem((5, 3, 7), ("^", "&")), flaw_rate=1.0, rng=random.Random(0))
    assert response == "5^3=7\n7&7=7\n\\boxed{7}"
    assert make_splits(3) == make_splits(3) != make_splits(4)


def test_responses_fit_and_the_experiment_names_what_the_example_writes() -> None:
    config, directory = load_config(["experiment=tiny_logic"]), TASKS["logic"].directory
    longest = worked_answer(Problem((1,) * logic.MAX_WORDS, ("&",) * (logic.MAX_WORDS - 1))) + END_OF_TEXT
    assert len(make_tokenizer().encode(longest)) <= load_config(["experiment=tiny_sft"]).rollout.max_response_tokens
    assert (config.student.path, config.teacher.path) == (f"{directory}/student", f"{directory}/teacher")
    assert (config.reward.kind, config.data.eval) == ("exact_match", f"{directory}/data/eval.jsonl")


def test_kdrl_trains_on_it(tmp_path: Path, ranks2: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps from an untrained pair: the student approaches its teacher, and a format reward is added to the
    verifier's."""
    monkeypatch.setattr(logic, "SPLITS", {"eval": 4, "validation": 2, "train": 64, "sft": 2})
    write_data(tmp_path / "data", FLAW_RATE)
    for name in ("student", "teacher"):
        write_random_model(tmp_path / name, name)
    overrides = [
        *("experiment=tiny_logic", "objective=kdrl", "objective.beta.init=1", "parallel.tensor=2", "trainer.steps=6"),
        *("reward.terms=[{kind: format, weight: 0.5}]", "optimizer.lr=3e-3", "optimizer.warmup_steps=0"),
        *(f"student.path={tmp_path}/student", f"teacher.path={tmp_path}/teacher", f"run.dir={tmp_path}/run"),
        *(f"data.train={tmp_path}/data/train.jsonl", f"data.eval={tmp_path}/data/eval.jsonl"),
        *("rollout.max_response_tokens=24", "eval.every=0", "checkpoint.export_hf=false", *FAST),
    ]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    metrics = [row for row in metrics_of(tmp_path / "run") if "kl" in row]
    assert len(metrics) == 6 and metrics[-1]["kl"] < 0.7 * metrics[0]["kl"]
    assert {"eval/eval/avg@2", "eval/eval/maj@2", "eval/accuracy"} <= metrics_of(tmp_path / "run")[-1].keys()
    written = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text()
    assert '"reward_format": 0.0' in written

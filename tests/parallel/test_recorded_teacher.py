"""Scores computed beforehand train as a teacher in the job does, and those of another teacher are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference.tiny_models import write_jsonl
from tests.support.agreement import JOINT, Case, check, overrides_of
from tests.support.ranks import RankPool
from tests.support.training import Outcome, listen, train_on_rank
from tests.support.zoo import Zoo

RECORDED = "teacher.weights=recorded"
CASES = {
    "k2, tp2, other layout": Case(2, f"{RECORDED} parallel.tensor=2", JOINT),
    "k1, token weights by the teacher's entropy": Case(
        2, f"{RECORDED} parallel.context=2", replace(JOINT, estimator="k1", token_weight="teacher_entropy", mask="response")
    ),
    "k3, prompts of its own": Case(
        2, f"{RECORDED} teacher.prompt.template=plain", replace(JOINT, estimator="k3"), rollouts="privileged"
    ),
}


def score_on_rank(arguments: Sequence[str]) -> Outcome:
    """`kdrl-score`, as the command line calls it."""
    from kdrl_mcore.cli.score import main

    return listen(lambda: main(list(arguments)))


@pytest.fixture(scope="module")
def scored(zoo: Zoo, pools: dict[int, RankPool], tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo, with rollouts that the teacher has scored."""
    folder = tmp_path_factory.mktemp("scored")
    for name in ("untied", "teacher"):
        shutil.copytree(zoo.model(name), folder / name)
    for name, more in (("uneven", ()), ("privileged", ("--teacher-prompt", "own"))):
        arguments = ["--model", f"{folder}/untied", "--teacher", f"{folder}/teacher", "--teacher-tensor-parallel", "2", *more]
        arguments += ["--input", str(zoo.rollouts(name)), "--output", f"{folder}/{name}.jsonl"]
        outcomes = pools[2].run(score_on_rank, arguments)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return Zoo(folder)


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_recorded_scores_agree_with_the_dense_reference(
    case: Case, scored: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(case, scored, pools[case.ranks], tmp_path)


def test_scores_of_another_teacher_are_refused(scored: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    def told(*more: str, rollouts: Path | None = None) -> str:
        overrides = [*overrides_of(scored, tmp_path, "untied"), RECORDED, *more]
        overrides += [] if rollouts is None else [f"rollout.path={rollouts}"]
        (outcome,) = pools[1].run(train_on_rank, overrides)
        assert outcome.code == 1, outcome.stderr
        return outcome.stderr

    assert "line 1 has scores of another temperature: 1.0, and this run's is 0.5" in told("rollout.temperature=0.5")
    assert "has scores of another teacher" in told(f"teacher.path={scored.model('untied')}")
    own = "teacher.prompt.template=plain"
    assert "another prompt (teacher.prompt)" in told(
        own, rollouts=rewritten(scored, tmp_path, "p", teacher_prompts={"teacher": [1]})
    )
    assert "another number of vocabulary columns: 99" in told(rollouts=rewritten(scored, tmp_path, "c", columns=99))
    record = json.loads(scored.rollouts("uneven").read_text().splitlines()[0])["teacher_scores"]
    bare = rewritten(scored, tmp_path, "b", teacher_scores=None)
    assert record and "line 1 has no 'teacher_scores': score the file with kdrl-score --teacher" in told(rollouts=bare)


def rewritten(scored: Zoo, folder: Path, name: str, columns: int | None = None, **changes: object) -> Path:
    rows = [json.loads(line) | changes for line in scored.rollouts("uneven").read_text().splitlines()]
    if columns is not None:
        rows = [{**row, "teacher_scores": {**row["teacher_scores"], "columns": columns}} for row in rows]
    write_jsonl(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def test_a_run_that_leaves_its_rollouts_behind_ends(scored: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    overrides = [*overrides_of(scored, tmp_path, "untied"), RECORDED, "trainer.steps=9", "optimizer.lr=0.05"]
    (outcome,) = pools[1].run(train_on_rank, [*overrides, "teacher.min_ess=0.5"])
    assert outcome.code == 1, outcome.stderr
    assert "the effective sample size of pi/mu is" in outcome.stderr and "teacher.min_ess=0.5" in outcome.stderr

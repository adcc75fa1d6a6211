"""Responses that the teacher scores while others are being sampled train like those that it scores together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.agreement import JOINT, Case, check
from tests.support.ranks import RankPool
from tests.support.training import metrics_of, score_in_parts_and_train_on_rank
from tests.support.zoo import Zoo

CASES = {
    "k2, teacher dp2": Case(2, "parallel.tensor=2 teacher.parallel.tensor=1", JOINT),
    "exact, teacher pp2": Case(2, "teacher.parallel.pipeline=2 batch.micro_tokens=40", replace(JOINT, estimator="exact")),
    "exact, masked, pp2": Case(2, "parallel.pipeline=2", replace(JOINT, estimator="exact", mask="response")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_parts_agree_with_the_dense_reference(case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(case, zoo, pools[case.ranks], tmp_path, score_in_parts_and_train_on_rank)
    (row,) = metrics_of(tmp_path)
    assert 0 < row["teacher_tokens_early"] < row["teacher_tokens"]

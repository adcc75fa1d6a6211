"""With two and four ranks that share the vocabulary, every value and gradient is that of dense autograd, whatever the
layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.reference.output_head import EXACT_FORM, KINDS, Problem, dense, make_problem
from tests.support import vocabulary
from tests.support.ranks import RankPool
from tests.support.vocabulary import Layout, answer, assert_same

EXACT = {"rtol": 1e-10, "atol": 1e-11}
FUSED = [kind for kind in KINDS if kind != "logits"]
TAUGHT = [kind for kind in FUSED if kind != "head"]

SUPPORTS = [(0.6, 0, 0.0), (1.0, 4, 0.0), (1.0, 0, 0.15), (0.8, 9, 0.04)]
"""top_p, top_k and min_p, each alone and all together."""

LAYOUTS = {
    "2 ranks, the last partly padded": Layout(2, 24, chunk_tokens=4),
    "2 ranks, the last without a real column": Layout(2, 48, chunk_tokens=1),
    "2 ranks, sequence-parallel": Layout(2, 26, sequence_parallel=True, chunk_tokens=100),
    "4 ranks, the last partly padded": Layout(4, 24),
    "4 ranks, one partly padded, one without a real column": Layout(4, 32, chunk_tokens=3),
    "4 ranks, sequence-parallel": Layout(4, 24, sequence_parallel=True, chunk_tokens=5),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.fixture
def pool(layout: Layout, request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{layout.ranks}")


def answers(problems: list[Problem], kinds: list[str], layout: Layout) -> list[list[vocabulary.Answer]]:
    """On a rank: all problems of all kinds."""
    return [[answer(problem, kind, layout) for problem in problems] for kind in kinds]


def check(pool: RankPool, problems: list[Problem], kinds: list[str], layout: Layout, **tolerance: float) -> None:
    by_rank = pool.run(answers, problems, kinds, layout)
    for i, kind in enumerate(kinds):
        for j, problem in enumerate(problems):
            assert_same([rank[i][j] for rank in by_rank], dense(problem, kind), layout, **tolerance)


def fits(kinds: list[str], layout: Layout) -> list[str]:
    """Logits that have already been computed are independent of sequence parallelism."""
    return [kind for kind in kinds if kind != "logits" or not layout.sequence_parallel]


def test_values_and_gradients_are_those_of_dense_autograd(pool: RankPool, layout: Layout) -> None:
    check(pool, [make_problem()], fits([*KINDS], layout), layout, **EXACT)


def test_teacher_for_the_first_rows_or_for_none(pool: RankPool, layout: Layout) -> None:
    check(pool, [make_problem(num_taught=num_taught) for num_taught in (0, 5)], TAUGHT, layout, **EXACT)


def test_without_tokens(pool: RankPool, layout: Layout) -> None:
    for parts in pool.run(answers, [make_problem(0, 0)], fits([*KINDS], layout), layout):
        for (one,) in parts:
            assert one.loss == 0
            assert not one.d_hidden_SH.any()
            assert not one.d_weight_VH.any()


def test_sets_larger_than_a_rank_holds(pool: RankPool, layout: Layout) -> None:
    """A support of ten tokens from four ranks with six each, and of all 23."""
    check(pool, [make_problem(top_k=10)], TAUGHT, layout, **EXACT)
    by_rank = pool.run(answers, [make_problem(top_k=23)], list(EXACT_FORM), layout)
    for i, exact in enumerate(EXACT_FORM.values()):
        assert_same([rank[i][0] for rank in by_rank], dense(make_problem(), exact), layout, **EXACT)


def test_ties_give_one_set_on_every_layout(pool: RankPool, layout: Layout) -> None:
    """One-bit logits, most of which are equal on all ranks: the set then has the lower ids."""
    problem = make_problem(top_k=7)
    student, teacher = (
        weight.sign().abs() * (weight[:, :1] > 0.5) for weight in (problem.weight_VH, problem.teacher_weight_VG)
    )
    ones = torch.where(problem.hidden_SH.isnan(), torch.nan, 1.0).double()
    tied = replace(problem, hidden_SH=ones, weight_VH=student, teacher_weight_VG=teacher)
    tied = replace(tied, teacher_hidden_DG=torch.arange(45.0, dtype=torch.float64).view(9, 5) % 2)
    check(pool, [tied], TAUGHT, layout, **EXACT)


def test_a_truncated_distribution(pool: RankPool, layout: Layout) -> None:
    """Some targets are outside, and some of the logits at the bound are equal, also on different ranks."""
    problem = make_problem()
    hidden_SH = (problem.hidden_SH * 2).round() / 2
    tied = replace(problem, hidden_SH=hidden_SH, weight_VH=(problem.weight_VH).round(), temperature=1.0)
    problems = [replace(each, support=support) for each in (problem, tied) for support in SUPPORTS]
    outside = [int((dense(each, "head").log_probs_T < -1e29).sum()) for each in problems]
    assert all(0 < count < 9 for count in outside), outside
    check(pool, problems, ["head", "exact"], layout, **EXACT)


def test_huge_logits_stay_finite_in_float32(pool: RankPool, layout: Layout) -> None:
    problem = make_problem(scale=3e3).to(torch.float32)
    for parts in pool.run(answers, [problem], fits([*KINDS], layout), layout):
        for (one,) in parts:
            for name in ("loss", "log_probs_T", "entropy_T", "divergence_T", "d_weight_VH"):
                assert torch.isfinite(getattr(one, name)).all(), name
            assert one.log_probs_T.min() < -1e4


def test_float32(pool: RankPool, layout: Layout) -> None:
    check(pool, [make_problem().to(torch.float32)], fits([*KINDS], layout), layout, rtol=2e-5, atol=2e-5)


def test_bfloat16_agrees_with_one_rank(pool: RankPool, layout: Layout) -> None:
    """The logits of each column are the same product on any layout, so the log-probs agree far below bfloat16's
    precision; dX is the sum of the ranks' rounded parts."""
    problem, kinds = make_problem(scale=0.3).to(torch.bfloat16), fits(["head", "exact"], layout)
    by_rank = pool.run(answers, [problem], kinds, layout)
    for i, kind in enumerate(kinds):
        alone = answer(problem, kind, replace(layout, ranks=1, sequence_parallel=False))
        parts = [rank[i][0] for rank in by_rank]
        for one in parts:
            torch.testing.assert_close(one.log_probs_T, alone.log_probs_T, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(one.divergence_T, alone.divergence_T, rtol=1e-5, atol=1e-5)
        d_hidden_SH = torch.cat([one.d_hidden_SH for one in parts]) if layout.sequence_parallel else parts[0].d_hidden_SH
        difference = (d_hidden_SH.double() - alone.d_hidden_SH.double()).norm()
        # Each rank's part is rounded once, and so are their sums; the parts may be larger than the total.
        assert difference <= 4 * layout.ranks * 2.0**-9 * alone.d_hidden_SH.double().norm()
        d_weight_PH = torch.cat([one.d_weight_VH for one in parts])
        torch.testing.assert_close(d_weight_PH, alone.d_weight_VH, rtol=2.0**-7, atol=1e-3)

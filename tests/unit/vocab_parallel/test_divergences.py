"""What each divergence claims: where its gradient vanishes, its limits, and its numbers for very peaked distributions.

Values and gradients in general are checked in `test_head.py` and, on several ranks, in `tests/parallel`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel import JensenShannon, TeacherInputs, VocabShard, fused_head
from kdrl_mcore.vocab_parallel.divergence import Divergence
from tests.reference.output_head import Problem, dense_divergence, make_problem
from tests.support.vocabulary import divergence

AGREEING = ["exact", "forward", "mixed 0.3", "mixed 0.9"]
"""Forms whose gradient vanishes where the student's distribution is the teacher's."""


def run(form: Divergence, p: Problem) -> tuple[Tensor, Tensor]:
    """(divergences [T], gradient of their sum in the student's weight)."""
    weight_VH = p.weight_VH.clone().requires_grad_()
    shard = VocabShard(None, 0, len(weight_VH), len(weight_VH))
    teacher = TeacherInputs(p.teacher_hidden_DG, p.teacher_weight_VG, form)
    outputs = fused_head(
        p.hidden_SH,
        weight_VH,
        p.rows_T,
        p.targets_T,
        lambda tokens, rows: tokens.divergences,
        shard,
        temperature=p.temperature,
        teacher=teacher,
        chunk_tokens=4,
    )
    return outputs.divergences, torch.autograd.grad(outputs.loss, weight_VH)[0]


def dense(kind: str, p: Problem) -> tuple[Tensor, Tensor]:
    """The same in float64 from whole logits."""
    p = p.to(torch.float64)
    weight_VH = p.weight_VH.clone().requires_grad_()
    log_p_TV = (p.hidden_SH[p.rows_T] @ weight_VH.T / p.temperature).log_softmax(1)
    log_q_TV = (p.teacher_hidden_DG @ p.teacher_weight_VG.T / p.temperature).log_softmax(1)
    divergence_T = dense_divergence(p, kind, log_p_TV, log_q_TV, log_p_TV.gather(1, p.targets_T[:, None]).squeeze(1))
    return divergence_T.detach(), torch.autograd.grad(divergence_T.sum(), weight_VH)[0]


def agreeing(problem: Problem) -> Problem:
    """The same distributions as student and as teacher."""
    return replace(problem, teacher_hidden_DG=problem.hidden_SH[problem.rows_T], teacher_weight_VG=problem.weight_VH)


def exchanged(problem: Problem) -> Problem:
    """Student and teacher in each other's place."""
    hidden_SH = torch.full((16, 5), torch.nan, dtype=torch.float64)
    hidden_SH[:9] = problem.teacher_hidden_DG
    return replace(
        agreeing(problem),
        hidden_SH=hidden_SH,
        weight_VH=problem.teacher_weight_VG,
        teacher_weight_VG=problem.weight_VH,
        rows_T=torch.arange(9),
    )


@pytest.mark.parametrize("kind", AGREEING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_where_student_and_teacher_agree_value_and_gradient_are_zero(kind: str, dtype: torch.dtype) -> None:
    problem = agreeing(make_problem().to(dtype))
    divergence_T, gradient = run(divergence(kind, problem), problem)
    eps = torch.finfo(dtype).eps
    assert divergence_T.abs().max() <= 20 * eps
    assert gradient.abs().max() <= 20 * eps
    apart_T, gradient = run(divergence(kind, problem), make_problem().to(dtype))
    assert apart_T.min() > 1e-2 and gradient.abs().max() > 1e-2


@pytest.mark.parametrize(("beta", "end"), [(1e-6, "forward"), (1 - 1e-6, "exact")])
def test_near_its_ends_the_jensen_shannon_divergence_is_a_share_of_a_kl(beta: float, end: str) -> None:
    """To first order in the distance from the end; in between it is neither."""
    problem = make_problem()
    share = min(beta, 1 - beta)
    for actual, expected in zip(run(JensenShannon(beta), problem), run(divergence(end, problem), problem), strict=True):
        torch.testing.assert_close(actual / share, expected, rtol=1e-3, atol=1e-3)
    assert (run(JensenShannon(0.5), problem)[0] / 0.5 < 0.9 * run(divergence(end, problem), problem)[0]).all()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_student_and_teacher_can_change_places_in_the_jensen_shannon_divergence(beta: float) -> None:
    problem = make_problem()
    torch.testing.assert_close(
        run(JensenShannon(beta), problem)[0], run(JensenShannon(1 - beta), exchanged(problem))[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("beta", [1e-3, 0.3, 0.999])
def test_the_jensen_shannon_divergence_of_disjoint_distributions_is_the_entropy_of_beta(
    beta: float, dtype: torch.dtype
) -> None:
    """Each has all of its mass where the other's underflows to 0; the gradient, which pulls with p only, vanishes."""
    p = make_problem().to(dtype)
    p = replace(p, weight_VH=torch.zeros(23, 6, dtype=dtype), teacher_weight_VG=torch.zeros(23, 5, dtype=dtype))
    p.hidden_SH[p.rows_T], p.teacher_hidden_DG[:] = 1.0, 1.0
    p.weight_VH[3], p.teacher_weight_VG[7] = 1e3, 1e3
    divergence_T, gradient = run(JensenShannon(beta), p)
    expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    torch.testing.assert_close(divergence_T, torch.full_like(divergence_T, expected), rtol=1e-4, atol=0)
    assert gradient.abs().max() <= 1e-4


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.1, 1e-9, math.nan])
def test_beyond_its_ends_there_is_no_jensen_shannon_divergence(beta: float) -> None:
    with pytest.raises(ValueError, match="at 0 the forward KL is meant, at 1 the reverse KL") as error:
        JensenShannon(beta)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["exact", "forward", "mixed 0.3"])
@pytest.mark.parametrize("scale", [6.0, 60.0])
def test_peaked_distributions_keep_float32s_precision(kind: str, scale: float) -> None:
    """At the larger scale many probabilities are 0 in float32."""
    problem = make_problem(scale=scale).to(torch.float32)
    logits_TV = problem.hidden_SH[problem.rows_T] @ problem.weight_VH.T / problem.temperature
    assert scale < 60 or (logits_TV.softmax(1) == 0).float().mean() > 0.25
    (divergence_T, gradient), (expected_T, expected) = run(divergence(kind, problem), problem), dense(kind, problem)
    torch.testing.assert_close(divergence_T.double(), expected_T, rtol=1e-4, atol=1e-4)
    # A probability moves with the rounding of the logits.
    assert (gradient.double() - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * float(logits_TV.abs().max())
    assert scale == 60 or expected.abs().max() > 0.05

"""The properties of each divergence: where its gradient vanishes, its limits, and its values for very peaked distributions.

`test_head.py` and, for several ranks, `tests/parallel` check values and gradients in general.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdrl_mcore.vocab_parallel import (
    ClippedForwardKL,
    HeadTokens,
    JensenShannon,
    TeacherInputs,
    TopKForwardKL,
    VocabShard,
    fused_head,
)
from kdrl_mcore.vocab_parallel.divergence import Divergence
from kdrl_mcore.vocab_parallel.logits import _top_k_of_rows, largest_logits, local_top_k
from tests.reference.output_head import EXACT_FORM, Problem, dense_divergence, make_problem
from tests.support.vocabulary import divergence

CORRECTED = ["top_k student corrected", "top_k teacher corrected"]
AGREEING = [
    *("exact", "forward", "mixed 0.3", "mixed 0.9"),
    *(kind for kind in EXACT_FORM if not kind.endswith("truncate")),
]
"""Forms whose gradient vanishes if the student's distribution is the teacher's."""


def run(form: Divergence, p: Problem) -> tuple[Tensor, Tensor]:
    """(divergences [T], gradient of their sum with respect to the student's weight)."""
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
    """The same distributions for student and teacher."""
    return replace(problem, teacher_hidden_DG=problem.hidden_SH[problem.rows_T], teacher_weight_VG=problem.weight_VH)


def exchanged(problem: Problem) -> Problem:
    """Student and teacher exchanged."""
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


def test_bounded_entries_of_the_forward_kl() -> None:
    """A bound that no entry reaches changes nothing. A lower one leaves no gradient where the models agree, and takes it from a
    token that only the teacher finds likely, so that what remains there is small."""
    problem = make_problem()
    for actual, expected in zip(run(ClippedForwardKL(1e3), problem), run(divergence("forward", problem), problem), strict=True):
        torch.testing.assert_close(actual, expected)
    value_T, gradient = run(ClippedForwardKL(0.05), agreeing(problem))
    assert value_T.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    apart = make_problem(scale=30.0)
    sizes = [run(form, apart)[1].norm() for form in (ClippedForwardKL(0.05), divergence("forward", apart))]
    assert sizes[0] < 1e-2 * sizes[1]


def test_a_bound_of_entries_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        ClippedForwardKL(0.0)


@pytest.mark.parametrize(("beta", "end"), [(1e-6, "forward"), (1 - 1e-6, "exact")])
def test_near_its_ends_the_jensen_shannon_divergence_is_a_share_of_a_kl(beta: float, end: str) -> None:
    """To first order in the distance from the end; in between it equals neither."""
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
    """Each has all its mass where the other's underflows to 0; the gradient, which is proportional to p, vanishes."""
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
    with pytest.raises(ValueError, match="use the forward KL instead of 0, and the reverse KL instead of 1") as error:
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
    # A probability changes with the rounding of the logits.
    assert (gradient.double() - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * float(logits_TV.abs().max())
    assert scale == 60 or expected.abs().max() > 0.05


def of_log_probs(log_p_TV: Tensor, log_q_TV: Tensor, top_k: int = 5) -> Problem:
    """A problem with these distributions: the hidden states are the rows of the unit matrix."""
    rows = len(log_p_TV)
    eye_TT = torch.eye(rows, dtype=log_p_TV.dtype)
    return replace(
        make_problem(top_k=top_k).to(log_p_TV.dtype),
        hidden_SH=eye_TT,
        weight_VH=log_p_TV.T.clone(),
        teacher_hidden_DG=eye_TT,
        teacher_weight_VG=log_q_TV.T.clone(),
        rows_T=torch.arange(rows),
        targets_T=torch.zeros(rows, dtype=torch.long),
        temperature=1.0,
    )


def teacher_log_probs(problem: Problem) -> Tensor:
    return (problem.teacher_hidden_DG @ problem.teacher_weight_VG.T / problem.temperature).log_softmax(1)


@pytest.mark.parametrize("support", ["student", "teacher"])
def test_a_truncated_reverse_kl_is_no_divergence(support: str) -> None:
    """A property, not an aim: if the student is the teacher, its value is 0 but its gradient is not."""
    problem = agreeing(make_problem())
    value_T, gradient = run(divergence(f"top_k {support} truncate", problem), problem)
    assert value_T.abs().max() < 1e-12
    assert gradient.abs().max() > 0.1
    # If the student has less mass on S than the teacher, the value is below 0: for half of it, -0.35 times the mass.
    log_q_TV = teacher_log_probs(make_problem())
    set_TK = log_q_TV.topk(5, dim=1).indices
    inside_T = log_q_TV.exp().gather(1, set_TK).sum(1)
    log_p_TV = log_q_TV + ((1 - inside_T / 2) / (1 - inside_T)).log()[:, None]
    log_p_TV = log_p_TV.scatter(1, set_TK, log_q_TV.gather(1, set_TK) - math.log(2))
    lower = of_log_probs(log_p_TV, log_q_TV)
    value_T = run(divergence("top_k teacher truncate", lower), lower)[0]
    torch.testing.assert_close(value_T, -0.5 * math.log(2) * inside_T, rtol=1e-10, atol=0)
    for kind in CORRECTED:
        assert run(divergence(kind, lower), lower)[0].min() > 0


def test_a_forward_kl_truncated_to_the_teachers_support_has_its_optimum_at_the_renormalised_teacher() -> None:
    log_q_TV = teacher_log_probs(make_problem())
    outside_TV = torch.ones_like(log_q_TV).scatter(1, log_q_TV.topk(5, dim=1).indices, 0.0)
    optimum = of_log_probs(log_q_TV - 1e3 * outside_TV, log_q_TV)
    kind = "forward_top_k teacher truncate"
    assert run(divergence(kind, optimum), optimum)[1].abs().max() < 1e-12
    same = of_log_probs(log_q_TV, log_q_TV)
    assert run(divergence(kind, same), same)[1].abs().max() > 1e-2


def test_what_is_no_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="forward KL truncated to the student's support is not a divergence") as error:
        TopKForwardKL(5, "student", "truncate")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="tail is 'corrected': it must be truncate, renormalize or bucket"):
        TopKForwardKL(5, "teacher", "corrected")


@pytest.mark.parametrize("log_mass", [-2.0, -14.0, -60.0])
def test_a_forward_kl_keeps_its_gradient_however_little_mass_the_student_has_outside(log_mass: float) -> None:
    """In float32: the derivative of log p_out is large if p_out is small, and must not be added only to be subtracted."""
    log_q_TV = teacher_log_probs(make_problem())
    set_TK = log_q_TV.topk(5, dim=1).indices
    log_p_TV = (log_q_TV.roll(1, 0) + log_mass).scatter(1, set_TK, log_q_TV.roll(2, 0).gather(1, set_TK)).log_softmax(1)
    problem = of_log_probs(log_p_TV.float(), log_q_TV.float())
    kind = "forward_top_k teacher bucket"
    (value_T, gradient), (expected_T, expected) = run(divergence(kind, problem), problem), dense(kind, problem)
    torch.testing.assert_close(value_T.double(), expected_T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_taught", [5, 9])
def test_one_pass_gives_all_that_the_entropy_mixed_distillation_needs(num_taught: int) -> None:
    """EOPD (arXiv 2603.07079): the sampled k1 as a part of the advantage for all tokens, plus the forward KL on the teacher's
    top-k, not renormalised, for tokens where the teacher's entropy over the whole vocabulary exceeds a threshold."""
    p, threshold, beta = make_problem(num_taught=num_taught), 1.8, 0.7
    seen: list[Tensor] = []

    def loss(tokens: HeadTokens) -> Tensor:
        assert tokens.teacher_entropies is not None and not tokens.teacher_log_probs.requires_grad
        advantages = beta * (tokens.teacher_log_probs - tokens.log_probs).detach()
        ratios = (tokens.log_probs - tokens.log_probs.detach()).exp()
        return -ratios * advantages + tokens.divergences * (tokens.teacher_entropies > threshold)

    def token_loss(tokens: HeadTokens, rows: slice) -> Tensor:
        assert tokens.teacher_entropies is not None
        seen.append(tokens.teacher_entropies)
        return loss(tokens)

    weight_VH = p.weight_VH.clone().requires_grad_()
    teacher = TeacherInputs(
        p.teacher_hidden_DG, p.teacher_weight_VG, TopKForwardKL(5, "teacher", "truncate"), with_entropy=True
    )
    outputs = fused_head(
        p.hidden_SH,
        weight_VH,
        p.rows_T,
        p.targets_T,
        token_loss,
        VocabShard(None, 0, 23, 23),
        temperature=p.temperature,
        teacher=teacher,
        chunk_tokens=4,
    )
    gradient = torch.autograd.grad(outputs.loss, weight_VH)[0]

    log_p_TV = (p.hidden_SH[p.rows_T] @ weight_VH.T / p.temperature).log_softmax(1)
    log_q_DV = teacher_log_probs(p)
    log_prob_T = log_p_TV.gather(1, p.targets_T[:, None]).squeeze(1)
    zeros = torch.zeros(len(p.rows_T) - num_taught, dtype=torch.float64)
    expected = loss(
        HeadTokens(
            log_prob_T,
            -(log_p_TV.exp() * log_p_TV).sum(1),
            torch.cat(
                (dense_divergence(p, "forward_top_k teacher truncate", log_p_TV[:num_taught], log_q_DV, log_prob_T), zeros)
            ),
            torch.cat((log_q_DV.gather(1, p.targets_T[:num_taught, None]).squeeze(1), zeros)),
            torch.cat((-(log_q_DV.exp() * log_q_DV).sum(1), zeros)),
        )
    ).sum()
    assert outputs.teacher_entropies is not None
    torch.testing.assert_close(torch.cat(seen), outputs.teacher_entropies, rtol=0, atol=0)
    taught_D = outputs.teacher_entropies[:num_taught] > threshold
    assert taught_D.any() and not taught_D.all()
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight_VH)[0], rtol=1e-10, atol=1e-12)


BIAS_OF_A_SET = {
    "top_k student truncate": 0.352,
    "top_k student renormalize": 0.461,
    "top_k student bucket": 0.378,
    "top_k student corrected": 0.265,
    "top_k teacher truncate": 0.958,
    "top_k teacher renormalize": 1.016,
    "top_k teacher bucket": 0.707,
    "top_k teacher corrected": 0.804,
    "forward_top_k teacher truncate": 0.254,
    "forward_top_k student renormalize": 0.663,
    "forward_top_k teacher bucket": 0.212,
    "forward_top_k student bucket": 0.483,
    "jsd_top_k teacher truncate": 0.525,
    "jsd_top_k student renormalize": 0.629,
    "jsd_top_k teacher bucket": 0.424,
    "jsd_top_k student bucket": 0.782,
}
"""|gradient - that over the whole vocabulary| / |the latter|, with 5 of 23 tokens of two different random models."""


@pytest.mark.parametrize("kind", EXACT_FORM)
def test_the_bias_of_a_top_k_set_is_the_stated_one(kind: str) -> None:
    problem = make_problem()
    gradient, exact = (run(divergence(each, problem), problem)[1] for each in (kind, EXACT_FORM[kind]))
    assert float((gradient - exact).norm() / exact.norm()) == pytest.approx(BIAS_OF_A_SET[kind], abs=0.002)


def test_no_term_of_a_jensen_shannon_divergence_is_negative() -> None:
    problem = make_problem()
    for kind in (kind for kind in EXACT_FORM if kind.startswith("jsd")):
        assert run(divergence(kind, problem), problem)[0].min() > 0


@pytest.mark.parametrize(("columns", "top_k"), [(23, 5), (1000, 7), (4099, 50), (300, 1), (5, 5)])
@pytest.mark.parametrize("levels", [None, 4, 1, 0], ids=["distinct", "few ties", "many ties", "all equal"])
def test_the_largest_logits_are_those_of_a_stable_sort(columns: int, top_k: int, levels: int | None) -> None:
    logits_CV = torch.randn(20, columns, generator=torch.Generator().manual_seed(1))
    if levels is not None:
        logits_CV = (logits_CV * levels).round()
    expected_CK = logits_CV.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(local_top_k(logits_CV, top_k), expected_CK)
    values_CK, column_CK = largest_logits(logits_CV, top_k)
    assert torch.equal(values_CK, logits_CV.gather(1, expected_CK))
    assert torch.equal(logits_CV.gather(1, column_CK), values_CK)
    assert torch.equal(_top_k_of_rows(logits_CV, top_k), expected_CK)  # the form for GPUs

"""Which estimators of the reverse KL have the right expected gradient, and how large their variance is.

The expectation is exact: every token of the vocabulary is the target once, weighted by mu, the policy that sampled. The
estimators are the trainer's, with log-probs from the vocab-parallel head. Off-policy, mu differs from the student pi.

N prefixes, V tokens, H hidden; T = N * V rows: each prefix occurs once with every token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.objective.divergences import importance_weight, k1, k2, k3
from kdrl_mcore.vocab_parallel import HeadTokens, TeacherInputs, TopKUnbiased, VocabShard, fused_head

N, V, H, TOP_K = 3, 21, 6, 5
RANKS = [1, 2]


def k2_with_differentiable_w(d_T: Tensor, w_T: Tensor) -> Tensor:
    """The mistake of a weight w that is not detached."""
    return 0.5 * w_T * d_T.square()


def one(w_T: Tensor) -> Tensor:
    """On-policy, the paper's form has no weight at all."""
    return torch.ones_like(w_T)


def same(w_T: Tensor) -> Tensor:
    return w_T


def models() -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states [N, H], student's head [V, H], teacher's head [V, H])."""
    random = torch.Generator().manual_seed(3)
    return tuple(torch.randn(size, H, generator=random, dtype=torch.float64) for size in (N, V, V))  # type: ignore[return-value]


def log_softmax_of(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
    return (hidden_NH @ weight_VH.T).log_softmax(1)


def sampler(on_policy: bool) -> Tensor:
    """log mu [N, V]: the student's log-probs, or those of an older student."""
    hidden_NH, weight_VH, _ = models()
    old_VH = weight_VH if on_policy else weight_VH + 0.3 * weight_VH.roll(1, 0)
    return log_softmax_of(hidden_NH, old_VH)


def exact_gradient() -> Tensor:
    """The gradient of sum_n KL(pi || teacher) with respect to the hidden states, by plain autograd."""
    hidden_NH, weight_VH, teacher_VH = models()
    hidden_NH.requires_grad_()
    log_p_NV, log_q_NV = log_softmax_of(hidden_NH, weight_VH), log_softmax_of(hidden_NH.detach(), teacher_VH)
    return torch.autograd.grad((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(), hidden_NH)[0]


Estimator = Callable[[Tensor, Tensor], Tensor]


def gradients(estimator: Estimator | str, weight: Callable[[Tensor], Tensor], on_policy: bool, ranks: int) -> Tensor:
    """On a rank: the estimator's gradient with respect to the hidden states for each prefix and sampled token, [N, V, H]."""
    hidden_NH, weight_VH, teacher_VH = models()
    rank, width = (dist.get_rank(), -(-V // ranks)) if ranks > 1 else (0, V)
    shard = VocabShard(dist.group.WORLD if ranks > 1 else None, rank * width, (rank + 1) * width, V)
    padded_VH, teacher_padded_VH = (
        torch.nn.functional.pad(w, (0, 0, 0, width * ranks - V))[shard.start : shard.stop] for w in (weight_VH, teacher_VH)
    )
    hidden_TH = hidden_NH.repeat_interleave(V, 0).requires_grad_()
    rows_T, targets_T = torch.arange(N * V), torch.arange(V).repeat(N)
    mu_T = sampler(on_policy).flatten()
    teacher = None
    if isinstance(estimator, str):
        divergence = TopKUnbiased(TOP_K, None if on_policy else mu_T)
        teacher = TeacherInputs(hidden_TH.detach(), teacher_padded_VH, divergence)
    teacher_T = log_softmax_of(hidden_NH, teacher_VH).flatten()

    def token_loss(tokens: HeadTokens, rows: slice) -> Tensor:
        if isinstance(estimator, str):
            return tokens.divergences
        w_C = weight(importance_weight(tokens.log_probs, mu_T[rows]))
        return estimator(teacher_T[rows] - tokens.log_probs, w_C)

    loss = fused_head(hidden_TH, padded_VH, rows_T, targets_T, token_loss, shard, temperature=1.0, teacher=teacher).loss
    return torch.autograd.grad(loss, hidden_TH)[0].view(N, V, H)


def expected_and_variance(
    request: pytest.FixtureRequest, estimator: Estimator | str, weight: Callable[[Tensor], Tensor], on_policy: bool, ranks: int
) -> tuple[Tensor, float]:
    """(the mean over mu [N, H], the total variance summed over prefixes) of the estimator's gradient."""
    if ranks == 1:
        gradient_NVH = gradients(estimator, weight, on_policy, ranks)
    else:
        gradient_NVH = request.getfixturevalue(f"ranks{ranks}").run(gradients, estimator, weight, on_policy, ranks)[0]
    mu_NV1 = sampler(on_policy).exp()[:, :, None]
    mean_NH = (mu_NV1 * gradient_NVH).sum(1)
    return mean_NH, float((mu_NV1 * (gradient_NVH - mean_NH[:, None]).square()).sum())


UNBIASED = [
    pytest.param(k2, one, True, id="k2 on-policy, w = 1"),
    pytest.param(k2, Tensor.detach, True, id="k2 on-policy, w detached"),
    pytest.param(k2, Tensor.detach, False, id="k2 off-policy, w detached"),
    pytest.param(k1, same, True, id="k1 on-policy"),
    pytest.param(k1, same, False, id="k1 off-policy"),
    pytest.param(k3, same, True, id="k3 on-policy, w differentiable"),
    pytest.param(k3, same, False, id="k3 off-policy, w differentiable"),
    pytest.param("top_k_unbiased", same, True, id="top_k_unbiased on-policy"),
    pytest.param("top_k_unbiased", same, False, id="top_k_unbiased off-policy"),
]
BIASED = [
    pytest.param(k2_with_differentiable_w, same, True, id="k2 on-policy, w differentiable"),
    pytest.param(k2_with_differentiable_w, same, False, id="k2 off-policy, w differentiable"),
    pytest.param(k3, one, True, id="k3 on-policy, w = 1"),
    pytest.param(k3, Tensor.detach, False, id="k3 off-policy, w detached"),
    pytest.param(k2, one, False, id="k2 off-policy, w = 1"),
]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("estimator", "weight", "on_policy"), UNBIASED)
def test_the_expected_gradient_is_that_of_the_exact_reverse_kl(
    request: pytest.FixtureRequest,
    estimator: Estimator | str,
    weight: Callable[[Tensor], Tensor],
    on_policy: bool,
    ranks: int,
) -> None:
    mean_NH, _ = expected_and_variance(request, estimator, weight, on_policy, ranks)
    torch.testing.assert_close(mean_NH, exact_gradient(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("estimator", "weight", "on_policy"), BIASED)
def test_the_wrong_weight_makes_the_gradient_biased(
    request: pytest.FixtureRequest, estimator: Estimator, weight: Callable[[Tensor], Tensor], on_policy: bool, ranks: int
) -> None:
    """The bias exceeds a tenth of the gradient, so it cannot be rounding."""
    mean_NH, _ = expected_and_variance(request, estimator, weight, on_policy, ranks)
    exact_NH = exact_gradient()
    assert (mean_NH - exact_NH).norm() > 0.1 * exact_NH.norm()


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_k1_with_a_detached_weight_learns_nothing(request: pytest.FixtureRequest, on_policy: bool, ranks: int) -> None:
    mean_NH, variance = expected_and_variance(request, k1, Tensor.detach, on_policy, ranks)
    assert not mean_NH.any()
    assert variance == 0


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_top_k_unbiased_scatters_less_than_k2(
    request: pytest.FixtureRequest, on_policy: bool, ranks: int, record_property: Callable[[str, object], None]
) -> None:
    _, sampled = expected_and_variance(request, k2, Tensor.detach, on_policy, ranks)
    _, mixed = expected_and_variance(request, "top_k_unbiased", same, on_policy, ranks)
    record_property("variance_over_k2", mixed / sampled)
    assert 0 < mixed < 0.5 * sampled

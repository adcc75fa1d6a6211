"""What the sampled forms of the axes learn in expectation: `joint_loss` on every token of a small vocabulary, weighed by mu.

The tokens' shares of the loss are mu itself, so the sum over the vocabulary is the expectation, exactly. N prefixes, V tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_mcore.config import CombineConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.objective.combine import Signals
from kdrl_mcore.objective.joint import TokenBatch, check_functions, joint_loss

N, V = 5, 9
random = torch.Generator().manual_seed(11)
Z, TEACHER, OLDER, INITIAL = (torch.randn(N, V, generator=random, dtype=torch.float64) * scale for scale in (1, 1, 0.6, 1))
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0], dtype=torch.float64)
CORRECT = torch.tensor([1, 0, 1, 0, 0])


def gradient(
    settings: str, *, on_policy: bool = True, alpha: float = 1.0, beta: float = 1.0, z: Tensor = Z, **more: Any
) -> Tensor:
    """The expected gradient [N, V] in the logits."""
    objective = load_config(
        ["objective=kdrl", "student.path=s", "teacher.path=t", "rollout=replay", "rollout.path=r", *settings.split()]
    ).objective
    z = z.clone().requires_grad_()
    log_pi_NV = z.log_softmax(1)
    log_mu_NV = log_pi_NV.detach() if on_policy else (z.detach() + OLDER).log_softmax(1)
    mu = log_mu_NV.exp().flatten()

    def spread(values_N: Tensor) -> Tensor:
        return values_N.to(z).repeat_interleave(V)

    batch = TokenBatch(
        advantages=spread(ADVANTAGES),
        policy_weights=mu,
        distillation_weights=mu,
        sampler_log_probs=log_mu_NV.flatten(),
        on_policy=on_policy,
        teacher_log_probs=TEACHER.log_softmax(1).flatten(),
        correct=spread(CORRECT),
        **more,
    )
    loss, _, _ = joint_loss(log_pi_NV.flatten(), batch, objective, alpha, beta)
    return torch.autograd.grad(loss.sum(), z)[0]


def reverse_kl_gradient(z: Tensor = Z, log_q_NV: Tensor | None = None) -> Tensor:
    z = z.clone().requires_grad_()
    log_p_NV = z.log_softmax(1)
    log_q_NV = TEACHER.log_softmax(1) if log_q_NV is None else log_q_NV
    return torch.autograd.grad((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(), z)[0]


def of_coefficients(c_NV: Tensor, weights_NV: Tensor) -> Tensor:
    """The gradient of -sum weights c log pi in the logits, c a constant."""
    z = Z.clone().requires_grad_()
    return torch.autograd.grad(-(weights_NV * c_NV * z.log_softmax(1)).sum(), z)[0]


def bias(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


PI, MU = Z.softmax(1), (Z + OLDER).softmax(1)
D = TEACHER.log_softmax(1) - Z.log_softmax(1)
S = torch.where(CORRECT == 1, 1.0, -1.0)[:, None]
SIGN_A = ADVANTAGES.sign()[:, None]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_bounded_weight_is_biased_by_what_it_cuts(estimator: str) -> None:
    """The same for each: -min(w, C) d grad log pi. The bias is that stated in docs/method.md."""
    bounded = f"objective.kd.estimator={estimator} objective.kd.importance=truncate objective.kd.importance_bound="
    found = gradient(f"{bounded}1.2", on_policy=False, alpha=0.0)
    expected = of_coefficients((PI / MU).clamp(max=1.2) * D, MU)
    torch.testing.assert_close(found, expected)
    assert bias(found, reverse_kl_gradient()) == pytest.approx(0.203, abs=0.002)
    torch.testing.assert_close(gradient(f"{bounded}100", on_policy=False, alpha=0.0), reverse_kl_gradient())


def test_tokens_outside_the_bounds_can_be_left_out() -> None:
    settings = "objective.kd.importance=mask objective.kd.importance_bound=1.5"
    w = PI / MU
    inside = torch.where((w >= 1 / 1.5) & (w <= 1.5), w, 0.0)
    torch.testing.assert_close(gradient(settings, on_policy=False, alpha=0.0), of_coefficients(inside * D, MU))


@pytest.mark.parametrize("signal", ["correct", "advantage"])
def test_sign_scales_the_tokens_in_which_the_teacher_agrees(signal: str) -> None:
    s = S if signal == "correct" else SIGN_A
    settings = f"objective.combine.kind=sign objective.combine.signal={signal}"
    g = torch.where(D.sign() == s, 1.8, 1.0)
    expected = of_coefficients(ADVANTAGES[:, None] + g * D, PI)
    torch.testing.assert_close(gradient(settings), expected)


@pytest.mark.parametrize("signal", ["correct", "advantage"])
@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_relu_has_the_coefficient_s_relu_s_d(signal: str, estimator: str) -> None:
    s = S if signal == "correct" else SIGN_A
    alpha = 0.0 if signal == "correct" else 1.0
    settings = f"objective.combine.kind=relu objective.combine.signal={signal} objective.kd.estimator={estimator}"
    found = gradient(f"{settings} objective.alpha.init={alpha}", alpha=alpha)
    torch.testing.assert_close(found, of_coefficients(s * (s * D).relu(), PI))
    if signal == "advantage":
        assert not found[-1].any()  # A = 0: nothing is learned


@pytest.mark.parametrize("bounds", ["both", "upper"])
def test_modulate_scales_the_advantage_and_has_no_gradient_of_its_own(bounds: str) -> None:
    m = (SIGN_A * D).exp().clamp(max=1.2)
    m = m.clamp(min=0.8) if bounds == "both" else m
    settings = f"objective.combine.kind=modulate objective.combine.bounds={bounds}"
    expected = of_coefficients((0.4 + 0.6 * m) * ADVANTAGES[:, None], PI)
    torch.testing.assert_close(gradient(settings, beta=0.6), expected)
    torch.testing.assert_close(gradient(settings, beta=0.0), of_coefficients(ADVANTAGES[:, None].expand(N, V), PI))


def test_gate_gives_each_response_one_of_the_two() -> None:
    found = gradient("objective.combine.kind=gate")
    expected = of_coefficients(torch.where(S > 0, ADVANTAGES[:, None].expand(N, V), D), PI)
    torch.testing.assert_close(found, expected)


def test_the_ratio_to_the_mixture_is_not_one_on_policy() -> None:
    """(pi / T)^beta, whose gradient is its own value's: tokens far from the teacher are clipped at once."""
    found = gradient("objective.combine.kind=ratio objective.clip_low=0.2 objective.clip_high=0.2", beta=0.5)
    rho = (-0.5 * D).exp()
    A = ADVANTAGES[:, None]
    clipped = ((A > 0) & (rho > 1.2)) | ((A < 0) & (rho < 0.8))
    assert 0.1 < float(clipped.double().mean()) < 0.5
    torch.testing.assert_close(found, of_coefficients(torch.where(clipped, 0.0, rho * A), PI))


@pytest.mark.parametrize("extrapolation", [0.5, 1.25, 2.0])
def test_the_signed_reference_rests_at_its_optimum(extrapolation: float) -> None:
    """pi = T^l ref^(1 - l) / Z at every prefix, and nowhere near the teacher for l = 2."""
    log_t, log_ref = TEACHER.log_softmax(1), INITIAL.log_softmax(1)
    optimum = extrapolation * log_t + (1 - extrapolation) * log_ref
    settings = f"objective.combine.kind=reference objective.combine.extrapolation={extrapolation} objective.alpha.init=0 "
    settings += "objective.reference_kl.estimator=k2"
    reference = {"reference_log_probs": log_ref.flatten(), "alpha": 0.0}
    assert gradient(settings, z=optimum, **reference).abs().max() < 1e-12
    assert gradient(settings, z=TEACHER, **reference).norm() > 0.1
    expected = reverse_kl_gradient(log_q_NV=optimum.log_softmax(1))
    torch.testing.assert_close(gradient(settings, **reference), expected)


def twice_the_advantage(signals: Signals, settings: CombineConfig, beta: float) -> tuple[Tensor, Tensor]:
    return 2 * signals.advantages, torch.full_like(signals.log_ratio, 3.0)


def test_a_rule_of_ones_own_is_one_of_the_axis() -> None:
    name = f"{__name__}:twice_the_advantage"
    expected = of_coefficients(2 * ADVANTAGES[:, None] + 3 * D, PI)
    torch.testing.assert_close(gradient(f"objective.combine.kind={name}"), expected)


@pytest.mark.parametrize("key", ["combine.kind", "policy_loss", "kd.token_weight.kind"])
def test_a_function_that_cannot_be_loaded_is_told(key: str) -> None:
    objective = load_config(
        ["objective=kdrl", "student.path=s", "teacher.path=t", f"objective.{key}=os.path:nowhere"]
    ).objective
    with pytest.raises(ConfigError, match=rf"objective\.{key}=os\.path:nowhere cannot be loaded"):
        check_functions(objective)


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    settings = "objective=grpo objective.policy_loss=cispo objective.clip_high=0.2"
    old = (Z + OLDER).log_softmax(1)
    found = gradient(settings, on_policy=False, beta=0.0, old_log_probs=old.flatten())
    rho = (PI / MU).clamp(max=1.2)
    torch.testing.assert_close(found, of_coefficients(rho * ADVANTAGES[:, None], MU))


def test_the_dual_clip_holds_a_negative_advantage() -> None:
    settings = "objective=grpo objective.dual_clip=1.5"
    old = (Z + OLDER).log_softmax(1)
    found = gradient(settings, on_policy=False, beta=0.0, old_log_probs=old.flatten())
    rho, A = PI / MU, ADVANTAGES[:, None]
    dead = ((A > 0) & (rho > 1.2)) | ((A < 0) & (rho < 0.8)) | ((A < 0) & (rho > 1.5))
    assert ((A < 0) & (rho > 1.5)).any()
    torch.testing.assert_close(found, of_coefficients(torch.where(dead, 0.0, rho * A), MU))

"""What the sampled forms of the axes learn in expectation: `joint_loss` on every token of a small vocabulary, weighted by mu.

The tokens' shares of the loss are mu itself, so the sum over the vocabulary is exactly the expectation. N prefixes, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_mcore.config import CombineConfig, DistillationConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.objective.combine import Signals
from kdrl_mcore.objective.joint import TokenBatch, check_functions, joint_loss

N, V = 5, 9
random = torch.Generator().manual_seed(11)
Z, TEACHER, OLDER, INITIAL = (torch.randn(N, V, generator=random, dtype=torch.float64) * scale for scale in (1, 1, 0.6, 1))
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0], dtype=torch.float64)
CORRECT = torch.tensor([1, 0, 1, 0, 0])


def evaluate(
    settings: str,
    *,
    on_policy: bool = True,
    alpha: float = 1.0,
    beta: float = 1.0,
    z: Tensor = Z,
    teacher: Tensor = TEACHER,
    shares_NV: Tensor | None = None,
    divergence: Callable[[Tensor], Tensor] | None = None,
    **more: Any,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(the loss of each token, the measured sums, the logits that they depend on).

    Args:
        shares_NV: each token's share of the loss; mu unless given.
        divergence: a function from the student's log-probs [N, V] to the divergence at each prefix [N].
    """
    objective = load_config(
        ["objective=kdrl", "student.path=s", "teacher.path=t", "rollout=replay", "rollout.path=r", *settings.split()]
    ).objective
    z = z.clone().requires_grad_()
    log_pi_NV = z.log_softmax(1)
    log_mu_NV = log_pi_NV.detach() if on_policy else (z.detach() + OLDER).log_softmax(1)
    shares = (log_mu_NV.exp() if shares_NV is None else shares_NV).flatten()

    def spread(values_N: Tensor) -> Tensor:
        return values_N.to(z).repeat_interleave(V)

    batch = TokenBatch(
        advantages=spread(ADVANTAGES),
        policy_weights=shares,
        distillation_weights=shares,
        sampler_log_probs=log_mu_NV.flatten(),
        on_policy=on_policy,
        teacher_log_probs=teacher.log_softmax(1).flatten(),
        correct=spread(CORRECT),
        **more,
    )
    divergence_T = None if divergence is None else spread(divergence(log_pi_NV))
    loss, sums, _ = joint_loss(log_pi_NV.flatten(), batch, objective, alpha, beta, divergence_T)
    return loss, sums, z


def gradient(settings: str, **more: Any) -> Tensor:
    """The expected gradient [N, V] with respect to the logits."""
    loss, _, z = evaluate(settings, **more)
    return torch.autograd.grad(loss.sum(), z)[0]


def variance(settings: str, *, on_policy: bool = True, **more: Any) -> float:
    """The variance of the gradient from one sampled token, summed over prefixes and logits."""
    loss, _, z = evaluate(settings, on_policy=on_policy, shares_NV=torch.ones(N, V, dtype=torch.float64), **more)
    each = torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0] for one in loss]).view(N, V, N, V)
    own_NVV = torch.stack([each[n, :, n] for n in range(N)])  # of prefix n, by the sampled token
    mu_NV1 = (PI if on_policy else MU)[:, :, None]
    mean_N1V = (mu_NV1 * own_NVV).sum(1, keepdim=True)
    return float((mu_NV1 * (own_NVV - mean_N1V).square()).sum())


def reverse_kl_gradient(z: Tensor = Z, log_q_NV: Tensor | None = None) -> Tensor:
    z = z.clone().requires_grad_()
    log_p_NV = z.log_softmax(1)
    log_q_NV = TEACHER.log_softmax(1) if log_q_NV is None else log_q_NV
    return torch.autograd.grad((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(), z)[0]


def of_coefficients(c_NV: Tensor, weights_NV: Tensor) -> Tensor:
    """The gradient of -sum weights c log pi with respect to the logits, for a constant c."""
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
    """The gradient is the same for each: -min(w, C) d grad log pi. The bias is the one stated in docs/method.md."""
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
    """The ratio is (pi / T)^beta, so tokens far from the teacher are clipped at once."""
    found = gradient("objective.combine.kind=ratio objective.clip_low=0.2 objective.clip_high=0.2", beta=0.5)
    rho = (-0.5 * D).exp()
    A = ADVANTAGES[:, None]
    clipped = ((A > 0) & (rho > 1.2)) | ((A < 0) & (rho < 0.8))
    assert 0.1 < float(clipped.double().mean()) < 0.5
    torch.testing.assert_close(found, of_coefficients(torch.where(clipped, 0.0, rho * A), PI))


@pytest.mark.parametrize("extrapolation", [0.5, 1.25, 2.0])
def test_the_signed_reference_rests_at_its_optimum(extrapolation: float) -> None:
    """pi = T^l ref^(1 - l) / Z at every prefix, which is far from the teacher for l = 2."""
    log_t, log_ref = TEACHER.log_softmax(1), INITIAL.log_softmax(1)
    optimum = extrapolation * log_t + (1 - extrapolation) * log_ref
    settings = f"objective.combine.kind=reference objective.combine.extrapolation={extrapolation} objective.alpha.init=0 "
    settings += "objective.reference_kl.estimator=k2"
    reference = {"reference_log_probs": log_ref.flatten(), "alpha": 0.0}
    assert gradient(settings, z=optimum, **reference).abs().max() < 1e-12
    assert gradient(settings, z=TEACHER, **reference).norm() > 0.1
    expected = reverse_kl_gradient(log_q_NV=optimum.log_softmax(1))
    torch.testing.assert_close(gradient(settings, **reference), expected)


def reverse_kl(log_p_NV: Tensor) -> Tensor:
    return (log_p_NV.exp() * (log_p_NV - TEACHER.log_softmax(1))).sum(1)


def forward_kl(log_p_NV: Tensor) -> Tensor:
    log_q_NV = TEACHER.log_softmax(1)
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1)


CENTRED = "objective.kd.control_variate=true"


@pytest.mark.parametrize(("on_policy", "left"), [(True, 0.704), (False, 0.902)], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_a_control_variate_leaves_the_gradient_and_takes_some_of_the_variance(
    estimator: str, on_policy: bool, left: float
) -> None:
    settings = f"objective.kd.estimator={estimator}"
    pure: dict[str, Any] = {"alpha": 0.0, "on_policy": on_policy}
    found = gradient(f"{settings} {CENTRED}", divergence=reverse_kl, **pure)
    torch.testing.assert_close(found, reverse_kl_gradient())
    centred = variance(f"{settings} {CENTRED}", divergence=reverse_kl, **pure)
    assert centred / variance(settings, **pure) == pytest.approx(left, abs=0.002)


def test_a_control_variate_also_serves_the_advantage() -> None:
    settings = "objective.kd.placement=advantage"
    found = gradient(f"{settings} {CENTRED}", divergence=reverse_kl)
    torch.testing.assert_close(found, gradient(settings))
    centred = variance(f"{settings} {CENTRED}", alpha=0.0, divergence=reverse_kl)
    assert centred / variance(settings, alpha=0.0) == pytest.approx(0.704, abs=0.002)


def test_with_a_weight_that_sees_the_token_a_control_variate_would_move_the_gradient() -> None:
    """Why such weights cannot be combined with it: with the trust weight min(T / pi, 1), and with a bounded pi / mu."""
    centred = D + reverse_kl(Z.log_softmax(1))[:, None]
    trust, bounded = D.exp().clamp(max=1.0), (PI / MU).clamp(max=1.2)
    assert bias(of_coefficients(trust * centred, PI), of_coefficients(trust * D, PI)) == pytest.approx(0.894, abs=0.002)
    assert bias(of_coefficients(bounded * centred, MU), of_coefficients(bounded * D, MU)) == pytest.approx(0.160, abs=0.002)


FORWARD = "objective.kd.estimator=exact objective.kd.divergence=forward"
TRUST = D.exp().clamp(max=1.0)


def drawn_variance(settings: str) -> float:
    """`variance` over the token and the draw."""
    both, chances = [], (TRUST[:, :, None], 1 - TRUST[:, :, None])
    for draw in (0.0, 1.0):
        draws = torch.full((N * V,), draw, dtype=torch.float64)
        shares = torch.ones(N, V, dtype=torch.float64)
        loss, _, z = evaluate(settings, alpha=0.0, divergence=forward_kl, draws=draws, shares_NV=shares)
        each = torch.stack([torch.autograd.grad(one, z, retain_graph=True)[0] for one in loss]).view(N, V, N, V)
        both.append(torch.stack([each[n, :, n] for n in range(N)]))
    weighed = [(PI[:, :, None] * chance, own_NVV) for chance, own_NVV in zip(chances, both, strict=True)]
    mean_N1V = torch.stack([(chance * own_NVV).sum(1, keepdim=True) for chance, own_NVV in weighed]).sum(0)
    return float(torch.stack([(chance * (own_NVV - mean_N1V).square()).sum() for chance, own_NVV in weighed]).sum())


def test_drawing_by_trust_is_trust_in_expectation() -> None:
    """A draw of 0 trusts every token, a draw of almost 1 none of those with T < pi; the draws are as likely as the trust."""
    expected = gradient(f"{FORWARD} objective.kd.mix=trust", divergence=forward_kl)
    drawn = f"{FORWARD} objective.kd.mix=drawn_trust"
    found = torch.zeros_like(expected)
    for draw, chance_NV in ((0.0, TRUST), (1.0, 1 - TRUST)):
        draws = torch.full((N * V,), draw, dtype=torch.float64)
        found += gradient(drawn, alpha=0.0, divergence=forward_kl, draws=draws, shares_NV=PI * chance_NV)
    torch.testing.assert_close(found + gradient("", beta=0.0), expected)
    trust = f"{FORWARD} objective.kd.mix=trust"
    assert drawn_variance(drawn) / variance(trust, alpha=0.0, divergence=forward_kl) == pytest.approx(1.511, abs=0.002)


def test_how_far_trust_is_from_the_reverse_kl() -> None:
    """It is a different objective: it has a bias by design, and a fifth of k2's variance."""
    settings = f"{FORWARD} objective.kd.mix=trust"
    found = gradient(settings, alpha=0.0, divergence=forward_kl)
    assert bias(found, reverse_kl_gradient()) == pytest.approx(0.728, abs=0.002)
    scatter = variance(settings, alpha=0.0, divergence=forward_kl) / variance("", alpha=0.0)
    assert scatter == pytest.approx(0.191, abs=0.002)


def test_trust_hardly_teaches_certainty() -> None:
    """Five prefixes at which the teacher gives one token 0.999. At four of them the student prefers it too, but gives another
    one the share e = 0.2, 0.1, 0.05 or 0.02; at the last it gives that one 0.7. How large the gradient of the four is, compared
    with that of the last: with trust an order of magnitude smaller than with the reverse KL."""

    def between_two(second: list[float]) -> Tensor:
        p = torch.tensor(second, dtype=torch.float64)
        return torch.stack([1 - p, p, *[torch.full_like(p, 1e-20)] * (V - 2)], dim=1).log()

    models = {"z": between_two([0.2, 0.1, 0.05, 0.02, 0.7]), "teacher": between_two([0.001] * N)}
    log_q_NV = models["teacher"].log_softmax(1)
    divergences = {
        "reverse": lambda log_p_NV: (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(1),
        "forward": lambda log_p_NV: (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(1),
    }
    settings = {"reverse": "objective.kd.estimator=exact", "forward": FORWARD, "trust": f"{FORWARD} objective.kd.mix=trust"}
    expected = {
        "reverse": [0.542, 0.260, 0.1156, 0.0363],
        "forward": [0.285, 0.1416, 0.0701, 0.0272],
        "trust": [0.1068, 0.0314, 0.01145, 0.00494],
    }
    for name, shares in expected.items():
        divergence = divergences["reverse" if name == "reverse" else "forward"]
        size_N = gradient(settings[name], alpha=0.0, divergence=divergence, **models).norm(dim=1)
        torch.testing.assert_close(size_N[:-1] / size_N[-1], torch.tensor(shares, dtype=torch.float64), rtol=5e-3, atol=0.0)


@pytest.mark.parametrize("mix", ["entropy", "trust"])
def test_on_policy_the_sampled_part_may_be_in_the_advantage(mix: str) -> None:
    log_q = TEACHER.log_softmax(1)
    entropies = -(log_q.exp() * log_q).sum(1).repeat_interleave(V)
    settings = f"{FORWARD} objective.kd.mix={mix}" + (" objective.kd.mix_above=1.7" if mix == "entropy" else "")
    assert 0 < (entropies > 1.7).double().mean() < 1
    more: dict[str, Any] = {"divergence": forward_kl, "teacher_entropies": entropies}
    inside = gradient(f"{settings} objective.kd.placement=advantage", **more)
    torch.testing.assert_close(inside, gradient(settings, **more))
    if mix == "entropy":
        assert bias(inside, gradient("")) > 0.1  # the forward KL contributes


def test_on_policy_k3_has_the_gradient_of_the_forward_kl() -> None:
    z = Z.clone().requires_grad_()
    expected = torch.autograd.grad(forward_kl(z.log_softmax(1)).sum(), z)[0]
    found = gradient("objective.kd.estimator=k3", alpha=0.0)
    torch.testing.assert_close(found, expected)
    assert bias(found, reverse_kl_gradient()) == pytest.approx(0.725, abs=0.002)


def test_tokens_that_the_teacher_did_not_score_learn_nothing_from_it() -> None:
    scored_NV = (torch.arange(V) < 4).double().expand(N, V)
    more: dict[str, Any] = {"scored": scored_NV.flatten(), "alpha": 0.0}
    torch.testing.assert_close(gradient("", **more), of_coefficients(scored_NV * D, PI))


def twice_the_advantage(signals: Signals, settings: CombineConfig, beta: float) -> tuple[Tensor, Tensor]:
    return 2 * signals.advantages, torch.full_like(signals.log_ratio, 3.0)


def test_a_rule_of_ones_own_is_one_of_the_axis() -> None:
    name = f"{__name__}:twice_the_advantage"
    expected = of_coefficients(2 * ADVANTAGES[:, None] + 3 * D, PI)
    torch.testing.assert_close(gradient(f"objective.combine.kind={name}"), expected)


def half_of_the_log_ratio(d_T: Tensor, w_T: Tensor) -> Tensor:
    return -0.5 * w_T * d_T.detach()


@pytest.mark.parametrize("on_policy", [True, False])
def test_so_is_an_estimator_of_ones_own(on_policy: bool) -> None:
    """w has the gradient of log pi, also on-policy."""
    settings = f"objective.kd.estimator={__name__}:half_of_the_log_ratio"
    found = gradient(settings, alpha=0.0, on_policy=on_policy)
    torch.testing.assert_close(found, 0.5 * reverse_kl_gradient())


def a_quarter_of_each(d_T: Tensor, entropies_T: Tensor, draws_T: Tensor, kd: DistillationConfig) -> tuple[Tensor, Tensor]:
    return torch.full_like(d_T, 0.25), torch.full_like(d_T, 0.75)


def test_so_is_a_mixture() -> None:
    z = Z.clone().requires_grad_()
    forward = torch.autograd.grad(forward_kl(z.log_softmax(1)).sum(), z)[0]
    found = gradient(f"{FORWARD} objective.kd.mix={__name__}:a_quarter_of_each", divergence=forward_kl, alpha=0.0)
    torch.testing.assert_close(found, 0.25 * reverse_kl_gradient() + 0.75 * forward)


def root(ratio_T: Tensor, bound: float) -> Tensor:
    return ratio_T.sqrt().clamp(max=bound)


def test_so_are_corrections_of_both_terms() -> None:
    name = f"{__name__}:root"
    settings = f"objective.sampler_correction.kind={name} objective.sampler_correction.bound=1.2"
    w, old = (PI / MU).sqrt(), {"old_log_probs": Z.log_softmax(1).flatten()}
    torch.testing.assert_close(
        gradient(f"objective=grpo {settings}", on_policy=False, beta=0.0, **old),
        of_coefficients(w.clamp(max=1.2) * ADVANTAGES[:, None], MU),
    )
    settings = f"objective.kd.importance={name} objective.kd.importance_bound=1.3"
    torch.testing.assert_close(gradient(settings, on_policy=False, alpha=0.0), of_coefficients(w.clamp(max=1.3) * D, MU))


def test_the_tokens_that_bounds_cut_and_a_mixture_replaces_are_counted() -> None:
    cut = (PI / MU > 1.2).sum()
    bounded = "objective.kd.importance=truncate objective.kd.importance_bound=1.2"
    assert evaluate(bounded, on_policy=False)[1]["kd_cut_tokens"] == cut > 0
    assert "kd_cut_tokens" not in evaluate("", on_policy=False)[1]
    mixed = evaluate(f"{FORWARD} objective.kd.mix=trust", divergence=forward_kl)[1]["mixed_tokens"]
    torch.testing.assert_close(mixed, (1 - TRUST).sum().float())


@pytest.mark.parametrize(
    "key",
    [
        *("combine.kind", "policy_loss", "sampler_correction.kind", "kd.token_weight.kind", "kd.estimator", "kd.mask"),
        *("kd.mix", "kd.importance", "alpha.kind", "beta.kind"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_told(key: str) -> None:
    forward = ["objective.kd.estimator=exact", "objective.kd.divergence=forward"] if key == "kd.mix" else []
    replay = ["rollout=replay", "rollout.path=r"]
    objective = load_config(
        ["objective=kdrl", "student.path=s", "teacher.path=t", *replay, *forward, f"objective.{key}=os.path:nowhere"]
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

"""The loss of each token, alpha * L_GRPO + beta * L_KD (arXiv 2506.02208), and the loss of supervised fine-tuning.

T: the response tokens of a micro-batch, concatenated over its responses. Each loss already carries its share of the global
normaliser (`aggregation`): summed over all tokens of all ranks it is the batch loss, and nothing divides it later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig, ObjectiveConfig
from kdrl_mcore.config.derived import OVER_THE_VOCABULARY
from kdrl_mcore.objective.combine import RULES, Signals, anchor, reference_coefficient
from kdrl_mcore.objective.correction import bounded_importance, sampler_correction
from kdrl_mcore.objective.divergences import ESTIMATORS, importance_weight, log_ratio, on_policy_weight
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.objective.mixes import MIXES
from kdrl_mcore.objective.policy import POLICY_LOSSES, PolicyLoss, policy_ratio

MAX_LOG_RATIO = 20.0
"""log pi/mu above which the measured effective sample size counts a token no more heavily, so that squares stay finite."""


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of the token losses, each tensor [T] float32.

    Attributes:
        policy_weights, distillation_weights: the token's share of the global loss; 0 where the response is masked.
        on_policy: whether the student's present weights sampled the tokens: then mu is pi, and importance weights are 1.
        old_log_probs: log pi_old; None while strictly on-policy.
        teacher_log_probs: arbitrary where the response is masked; None where the loss does not use them.
        reference_log_probs: log-probs of the reference model; None without one.
        correct: 1 where the response is correct, else 0; None if no rule needs it.
        teacher_entropies: the entropies of the teacher's distribution, if the settings need them.
        scored: 0 where the teacher did not score a token of a distilled response, or the token is left out, else 1; None if
            there is no such token.
        token_weights: the weight of the token's distillation (`token_weights.py`); None where it is 1.
        draws: a number drawn from [0, 1) for each token, where `objective.kd.mix` draws; otherwise None.
        sequence_ratios: pi / pi_old over the response (`objective.ratio`); None where each token has its own.
        sequence_log_ratios: log pi_old / mu over the response (`objective.sampler_correction.level`), likewise.
        kd_log_ratios: log pi / mu over the response (`objective.kd.importance_level`), likewise.
        given: 1 where the response was given, else 0; None without any (`without_sampler`).
        taught_by: which of several teachers teach the response, as a sum of 2^k (integers); None for one teacher.
    """

    advantages: Tensor
    policy_weights: Tensor
    distillation_weights: Tensor
    sampler_log_probs: Tensor
    on_policy: bool = False
    old_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    correct: Tensor | None = None
    teacher_entropies: Tensor | None = None
    scored: Tensor | None = None
    token_weights: Tensor | None = None
    draws: Tensor | None = None
    sequence_ratios: Tensor | None = None
    sequence_log_ratios: Tensor | None = None
    kd_log_ratios: Tensor | None = None
    given: Tensor | None = None
    taught_by: Tensor | None = None

    def __getitem__(self, rows: slice) -> TokenBatch:
        """The batch of a range of tokens."""
        return self.map(lambda value: value[rows])

    def without_sampler(self, log_probs: Tensor) -> TokenBatch:
        """The batch in which given responses have the present log-probs as those of mu and pi_old, so that nothing in them is
        clipped, corrected or counted as drift."""
        if self.given is None:
            return self
        given, now = self.given != 0, log_probs.detach()

        def neutral(values: Tensor | None, value: Tensor | float) -> Tensor | None:
            return None if values is None else torch.where(given, value, values)

        return replace(
            self,
            sampler_log_probs=torch.where(given, now, self.sampler_log_probs),
            old_log_probs=neutral(self.old_log_probs, now),
            sequence_ratios=neutral(self.sequence_ratios, 1.0),
            sequence_log_ratios=neutral(self.sequence_log_ratios, 0.0),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenBatch:
        """The same batch with `change` applied to every tensor."""
        changed: dict[str, Any] = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class _Tokens:
    """The quantities from which the losses of the tokens are computed, [T] each.

    Attributes:
        log_ratio: d = log T - log pi, with the gradient of log pi; 0 where the teacher did not score the token.
        importance: w = pi / mu, within the bounds of `objective.kd.importance`.
        cut: where these bounds changed it (bool); None if there are none.
        teacher_log_probs: log pi where the teacher did not score the token.
        distilled: whether the token is distilled (bool).
        coefficients: a of the policy loss, of `objective.combine`.
        taught_weights: the token weight of distillation, and its share of the global loss.
        kd_weights: the same times b, of `objective.combine`.
    """

    log_ratio: Tensor
    importance: Tensor
    cut: Tensor | None
    teacher_log_probs: Tensor
    distilled: Tensor
    coefficients: Tensor
    taught_weights: Tensor
    kd_weights: Tensor


def joint_loss(
    log_probs_T: Tensor,
    batch: TokenBatch,
    objective: ObjectiveConfig,
    alpha: float,
    beta: float,
    divergence_T: Tensor | None = None,
    entropies_T: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The weighted loss of each token, and its measurements.

    The rule of `objective.combine` gives the policy coefficient and the weight of distillation. With
    `objective.kd.placement=loss` the KD term is added to the loss. With `advantage` the log-ratio is added to the
    advantage, scaled so that the on-policy gradient is the same as with `loss` and k2 (or k1). With `reward` the advantages
    already contain it.

    Args:
        divergence_T: a differentiable per-token divergence over the vocabulary; see `estimate`.
        entropies_T: the student's, differentiable; only for `objective.entropy_bonus`.

    Returns:
        (loss [T], sums, maxima). Over micro-batches and ranks, `sums` are scalars to add and `maxima` scalars to take the
        maximum of. The sums policy_loss, kd_loss and reference_loss are weighted, so they add up to the batch's values;
        kl_k1, kl_k2 and kl_k3, present only without `divergence_T`, are plain sums over the distilled tokens.
    """
    tokens = _compare(log_probs_T, batch, objective, beta)
    estimated = estimate(objective.kd, tokens.log_ratio, tokens.importance, divergence_T, batch)
    policy_loss, rho_T, correction_T = _policy_parts(log_probs_T, batch, objective, tokens, beta)
    reference_T = _reference_term(log_probs_T, batch, objective, tokens)

    advantages_T = alpha * tokens.coefficients * batch.policy_weights
    if objective.kd.placement == "advantage":
        advantages_T = advantages_T + beta * estimated.coefficient * tokens.kd_weights
    policy_T, clipped_T = policy_loss(rho_T, log_probs_T, advantages_T, objective)
    loss_T = policy_T * correction_T
    if beta and estimated.in_loss is not None:
        loss_T = loss_T + beta * (torch.where(tokens.distilled, estimated.in_loss, 0.0) * tokens.kd_weights)
    if objective.entropy_bonus and entropies_T is not None:
        loss_T = loss_T - objective.entropy_bonus * entropies_T * batch.policy_weights
    if reference_T is not None:
        loss_T = loss_T + reference_coefficient(objective.combine, objective.reference_kl.coefficient, beta) * reference_T

    unweighted_T = policy_loss(rho_T, log_probs_T, tokens.coefficients, objective)[0]
    sums = {
        "policy_loss": unweighted_T * correction_T * batch.policy_weights,
        "kd_loss": torch.where(tokens.distilled, estimated.whole, 0.0) * tokens.kd_weights,
        "clipped_tokens": clipped_T,
        **({} if reference_T is None else {"reference_loss": reference_T}),
        **(sampled_divergences(tokens.log_ratio) if divergence_T is None else {}),
        **_measures_of_axes(objective, batch, tokens, estimated, correction_T),
    }
    return loss_T, *_measured(sums, log_probs_T, batch, tokens)


def _compare(log_probs_T: Tensor, batch: TokenBatch, objective: ObjectiveConfig, beta: float) -> _Tokens:
    """Compare student, teacher and sampler on each token, and combine the teacher's signal with the reward's."""
    kd = objective.kd
    w_T, cut_T = _weight(log_probs_T, batch, kd.estimator), None
    if not batch.on_policy:
        w_T, cut_T = bounded_importance(w_T, log_probs_T, kd, batch.kd_log_ratios)
    distilled_T = of_response_T = batch.distillation_weights != 0
    if batch.scored is not None:
        distilled_T = of_response_T & (batch.scored != 0)
    teacher_T = log_probs_T.detach() if batch.teacher_log_probs is None else batch.teacher_log_probs
    # A masked token's teacher log-prob may be anything, NaN included: it is replaced before it can reach a gradient.
    teacher_T = torch.where(distilled_T, teacher_T, log_probs_T.detach())
    d_T = log_ratio(teacher_T, log_probs_T, kd.clamp)

    correct_T = torch.zeros_like(distilled_T) if batch.correct is None else batch.correct != 0
    combine = find_function("objective.combine.kind", objective.combine.kind, RULES)
    signals = Signals(batch.advantages, correct_T, d_T.detach(), of_response_T)
    coefficients_T, kd_weight_T = combine(signals, objective.combine, beta)
    taught_T = batch.distillation_weights if batch.token_weights is None else batch.distillation_weights * batch.token_weights
    weights_T = taught_T if kd_weight_T is None else taught_T * kd_weight_T
    return _Tokens(d_T, w_T, cut_T, teacher_T, distilled_T, coefficients_T, taught_T, weights_T)


def _policy_parts(
    log_probs_T: Tensor, batch: TokenBatch, objective: ObjectiveConfig, tokens: _Tokens, beta: float
) -> tuple[PolicyLoss, Tensor, Tensor]:
    """The form of the policy loss, its ratio [T], and the correction of the tokens for their sampler [T]."""
    old_T = log_probs_T.detach() if batch.old_log_probs is None else batch.old_log_probs
    anchor_T = anchor(objective.combine, beta, old_T, tokens.teacher_log_probs, tokens.distilled)
    return (
        find_function("objective.policy_loss", objective.policy_loss, POLICY_LOSSES),
        policy_ratio(log_probs_T, anchor_T, batch.sequence_ratios),
        sampler_correction(old_T, batch.sampler_log_probs, objective.sampler_correction, batch.sequence_log_ratios),
    )


def _reference_term(log_probs_T: Tensor, batch: TokenBatch, objective: ObjectiveConfig, tokens: _Tokens) -> Tensor | None:
    """The weighted KL to the initial student [T], None without one. With `combine.kind=reference` it is one half
    of distillation and has the same weights: without the teacher's half, a negative coefficient would only drive pi away."""
    if batch.reference_log_probs is None:
        return None
    form = objective.reference_kl.estimator
    w_T, weights_T = _weight(log_probs_T, batch, form), batch.policy_weights
    if objective.combine.kind == "reference":
        weights_T = tokens.taught_weights
        if not batch.on_policy:
            w_T, _ = bounded_importance(w_T, log_probs_T, objective.kd, batch.kd_log_ratios)
    return ESTIMATORS[form](batch.reference_log_probs - log_probs_T, w_T) * weights_T


@dataclass(frozen=True)
class Estimate:
    """The KD term of each token before its weight, [T] each.

    Attributes:
        whole: the term itself.
        coefficient: what `objective.kd.placement=advantage` adds to the advantage for the sampled part of it (detached).
        in_loss: the part that `placement` leaves in the loss: all of it, what is not sampled, or None.
        mixed: the share of the divergence over the vocabulary in a mixture (`objective.kd.mix`); None without one.
    """

    whole: Tensor
    coefficient: Tensor
    in_loss: Tensor | None
    mixed: Tensor | None = None


def estimate(kd: DistillationConfig, d_T: Tensor, w_T: Tensor, divergence_T: Tensor | None, batch: TokenBatch) -> Estimate:
    """The KD term: a sampled estimator, a divergence over the vocabulary, or with `objective.kd.mix` both.

    With `objective.kd.control_variate` d is replaced by d - E_pi[d], the expectation detached (vOPD, arXiv 2605.07865): E_pi[d]
    is minus the divergence. On-policy, and with an exact w, the expected gradient of k1 and k2 stays that of the reverse KL,
    and so is that of d in the advantage. The variance is 0.70 of k2's on-policy and 0.90 off-policy in the setting of
    `test_axes_expectation.py`.

    Args:
        d_T, w_T: log T - log pi and pi / mu.
        divergence_T: differentiable; None if the teacher scored no token of the batch over the vocabulary.
    """
    in_loss = kd.placement == "loss"
    if kd.estimator not in OVER_THE_VOCABULARY:
        centred_T = d_T if divergence_T is None else d_T + divergence_T.detach()
        sampled_T = find_function("objective.kd.estimator", kd.estimator, ESTIMATORS)(centred_T, w_T)
        return Estimate(sampled_T, centred_T.detach(), sampled_T if in_loss else None)
    if divergence_T is None:  # no token of the whole batch is distilled
        return Estimate(torch.zeros_like(d_T), d_T.detach(), None)
    if kd.mix == "none":
        return Estimate(divergence_T, d_T.detach(), divergence_T)
    mix = find_function("objective.kd.mix", kd.mix, MIXES)
    sampled_share_T, share_T = mix(d_T.detach(), batch.teacher_entropies, batch.draws, kd)
    part_T = share_T * divergence_T
    whole_T = sampled_share_T * ESTIMATORS["k2"](d_T, w_T) + part_T
    return Estimate(whole_T, sampled_share_T * d_T.detach(), whole_T if in_loss else part_T, share_T)


def _measured(
    sums: dict[str, Tensor], log_probs_T: Tensor, batch: TokenBatch, tokens: _Tokens
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums over the tokens, those of every loss among them, and the maxima."""
    drift_T = (log_probs_T.detach() - batch.sampler_log_probs).abs()
    sums = sums | {"distilled_tokens": tokens.distilled, "drift": drift_T, "tokens": torch.ones_like(log_probs_T)}
    if not batch.on_policy:
        ratio_T = (log_probs_T.detach() - batch.sampler_log_probs).clamp(max=MAX_LOG_RATIO).exp()
        sums |= {"ratio": ratio_T, "ratio_squared": ratio_T.square()}
    return (
        {name: value.detach().sum(dtype=torch.float32) for name, value in sums.items()},
        {"drift_max": drift_T.max() if len(drift_T) else torch.zeros((), device=drift_T.device)},
    )


def _measures_of_axes(
    objective: ObjectiveConfig, batch: TokenBatch, tokens: _Tokens, estimated: Estimate, correction_T: Tensor
) -> dict[str, Tensor]:
    """Sums that show the effect of the active axes: the tokens that are taught, those whose advantage a rule changed, the
    divergence's share of a mixture, and the weights of the corrections with their squares."""
    sums: dict[str, Tensor] = {}
    if objective.combine.kind != "add" or batch.token_weights is not None:
        sums["taught_tokens"] = tokens.kd_weights != 0
    if objective.combine.kind != "add":
        sums["gated_tokens"] = tokens.coefficients != batch.advantages
    if objective.sampler_correction.kind != "none":
        sums |= {"correction": correction_T, "correction_squared": correction_T.square(), "corrected_tokens": correction_T != 1}
    if estimated.mixed is not None:
        sums["mixed_tokens"] = torch.where(tokens.distilled, estimated.mixed, 0.0)
    if tokens.cut is not None:
        weights_T = torch.where(tokens.distilled, tokens.importance.detach(), 0.0)
        sums |= {"kd_importance": weights_T, "kd_importance_squared": weights_T.square()}
        sums["kd_cut_tokens"] = tokens.distilled & tokens.cut
    return sums


def check_functions(objective: ObjectiveConfig) -> None:
    """Load the functions that the configuration names, so that a wrong name is reported before anything is trained.

    Raises:
        ConfigError: one cannot be loaded.
    """
    kd = objective.kd
    for key, name in (
        ("combine.kind", objective.combine.kind),
        ("policy_loss", objective.policy_loss),
        ("sampler_correction.kind", objective.sampler_correction.kind),
        ("kd.token_weight.kind", kd.token_weight.kind),
        ("kd.estimator", kd.estimator),
        ("kd.mix", kd.mix),
        ("kd.importance", kd.importance),
        ("kd.mask", kd.mask),
        ("alpha.kind", objective.alpha.kind),
        ("beta.kind", objective.beta.kind),
    ):
        if ":" in name:
            find_function(f"objective.{key}", name, {})


def sampled_divergences(d_T: Tensor) -> dict[str, Tensor]:
    """Per-token estimates of the reverse KL from the log-ratio, for the metrics."""
    return {"kl_k1": -d_T, "kl_k2": 0.5 * d_T.square(), "kl_k3": d_T.expm1() - d_T}


def measured_divergences(d_D: Tensor, divergence_D: Tensor) -> dict[str, Tensor]:
    """The sums that `joint_loss` omits when it is given a divergence, over the D distilled tokens: the sampled estimates, and
    the divergence itself as kl_full."""
    measures = sampled_divergences(d_D) | {"kl_full": divergence_D}
    return {name: value.detach().sum(dtype=torch.float32) for name, value in measures.items()}


def divergences_by_teacher(
    log_probs_T: Tensor, batch: TokenBatch, names: Sequence[str], divergence_T: Tensor | None = None
) -> dict[str, Tensor]:
    """For each of several teachers the number of sampled tokens that it teaches (alone or with others), and sums over these of
    k1 and, if it is given, of the divergence over the vocabulary: for its metrics, and for a share that follows them."""
    assert batch.taught_by is not None
    taught_T = batch.distillation_weights != 0
    for excluded, value in ((batch.scored, 0), (batch.given, 1)):
        taught_T = taught_T if excluded is None else taught_T & (excluded != value)
    now_T = log_probs_T.detach()
    teacher_T = now_T if batch.teacher_log_probs is None else batch.teacher_log_probs
    k1_T = now_T - torch.where(taught_T, teacher_T, now_T)
    sums: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        own_T = taught_T & ((batch.taught_by >> number) & 1 != 0)
        values = {"tokens": own_T, "kl_k1": torch.where(own_T, k1_T, 0.0)}
        if divergence_T is not None:
            values["kl_full"] = torch.where(own_T, divergence_T.detach(), 0.0)
        sums |= {f"teacher/{name}/{key}": value.sum(dtype=torch.float32) for key, value in values.items()}
    return sums


def _weight(log_probs_T: Tensor, batch: TokenBatch, estimator: str) -> Tensor:
    """The estimator's w: 1 on-policy, else pi / mu."""
    if batch.on_policy:
        return on_policy_weight(log_probs_T, estimator)
    return importance_weight(log_probs_T, batch.sampler_log_probs)


def sft_loss(log_probs_T: Tensor, weights_T: Tensor) -> Tensor:
    """-log pi(target), weighted [T]."""
    return -log_probs_T * weights_T


def gradient_split(policy_norm: float, distillation_norm: float, total_norm: float) -> dict[str, float]:
    """The metrics of the two gradients a = alpha grad L_GRPO and b = beta grad L_KD, from their norms and the norm of their
    sum: both norms, and unless one of them is zero, their cosine (|a + b|^2 - |a|^2 - |b|^2) / (2 |a| |b|)."""
    split = {"grad_norm_policy": policy_norm, "grad_norm_kd": distillation_norm}
    if product := 2 * policy_norm * distillation_norm:
        split["grad_cosine"] = (total_norm**2 - policy_norm**2 - distillation_norm**2) / product
    return split

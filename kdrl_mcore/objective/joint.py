"""The loss of each token, alpha * L_GRPO + beta * L_KD (arXiv 2506.02208), and the loss of supervised fine-tuning.

T: the response tokens of a micro-batch, concatenated over its responses. Each loss already carries its share of the global
normaliser (`aggregation`): summed over all tokens of all ranks it is the batch loss, and nothing divides it later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig, ObjectiveConfig
from kdrl_mcore.objective import token_weights
from kdrl_mcore.objective.combine import RULES, Signals, anchor, reference_coefficient
from kdrl_mcore.objective.correction import bounded_importance, sampler_correction
from kdrl_mcore.objective.divergences import ESTIMATORS, importance_weight, log_ratio, on_policy_weight
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.objective.policy import POLICY_LOSSES, policy_ratio


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of the token losses, each tensor [T] float32.

    Attributes:
        policy_weights, distillation_weights: the token's share of the global loss; 0 where the response is masked.
        on_policy: whether the student's present weights sampled the tokens: then mu is pi, and importance weights are 1.
        old_log_probs: log pi_old; None while strictly on-policy.
        teacher_log_probs: arbitrary where the response is masked; None where the loss does not use them.
        reference_log_probs: log-probs of the reference model; None without one.
        correct: 1 where the response is correct, else 0; None if no rule asks.
        teacher_entropies: of the teacher's distribution, where the settings ask for it.
        token_weights: the weight of the token's distillation (`token_weights.py`); None where it is 1.
        sequence_ratios: pi / pi_old over the response (`objective.ratio=sequence`); None where each token has its own.
        sequence_log_ratios: log pi_old / mu over the response (`objective.sampler_correction.level`), likewise.
        given: 1 where the response was given, else 0; None without any (`without_sampler`).
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
    token_weights: Tensor | None = None
    sequence_ratios: Tensor | None = None
    sequence_log_ratios: Tensor | None = None
    given: Tensor | None = None

    def __getitem__(self, rows: slice) -> TokenBatch:
        """The batch of a range of tokens."""
        return self.map(lambda value: value[rows])

    def without_sampler(self, log_probs: Tensor) -> TokenBatch:
        """The batch in which present log-probs stand for those of mu and pi_old where a response was given: nothing is clipped,
        corrected or counted as drift there."""
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
        divergence_T: a differentiable per-token divergence that replaces the sampled estimator (exact and top-k forms).
        entropies_T: the student's, differentiable; only for `objective.entropy_bonus`.

    Returns:
        (loss [T], sums, maxima). Over micro-batches and ranks, `sums` are scalars to add and `maxima` scalars to take the
        maximum of. The sums policy_loss, kd_loss and reference_loss are weighted, so they add up to the batch's values;
        kl_k1, kl_k2 and kl_k3, present only without `divergence_T`, are plain sums over the distilled tokens.
    """
    kd = objective.kd
    w_T = _weight(log_probs_T, batch, kd.estimator)
    if not batch.on_policy:
        w_T = bounded_importance(w_T, log_probs_T, kd)
    distilled_T = batch.distillation_weights != 0
    teacher_T = log_probs_T.detach() if batch.teacher_log_probs is None else batch.teacher_log_probs
    # A masked token's teacher log-prob may be anything, NaN included: it is replaced before it can reach a gradient.
    teacher_T = torch.where(distilled_T, teacher_T, log_probs_T.detach())
    d_T = log_ratio(teacher_T, log_probs_T, kd.clamp)

    correct_T = torch.zeros_like(distilled_T) if batch.correct is None else batch.correct != 0
    combine = find_function("objective.combine.kind", objective.combine.kind, RULES)
    signals = Signals(batch.advantages, correct_T, d_T.detach(), distilled_T)
    coefficient_T, kd_weight_T = combine(signals, objective.combine, beta)
    kd_weights_T = batch.distillation_weights
    for factor_T in (kd_weight_T, batch.token_weights, _weight_of_entropies(kd, batch)):
        kd_weights_T = kd_weights_T if factor_T is None else kd_weights_T * factor_T

    advantages_T = alpha * coefficient_T * batch.policy_weights
    if kd.placement == "advantage":
        advantages_T = advantages_T + beta * d_T.detach() * kd_weights_T
    old_T = log_probs_T.detach() if batch.old_log_probs is None else batch.old_log_probs
    anchor_T = anchor(objective.combine, beta, old_T, teacher_T, distilled_T)
    rho_T = policy_ratio(log_probs_T, anchor_T, batch.sequence_ratios)
    policy_loss = find_function("objective.policy_loss", objective.policy_loss, POLICY_LOSSES)
    policy_T, clipped_T = policy_loss(rho_T, log_probs_T, advantages_T, objective)
    correction_T = sampler_correction(old_T, batch.sampler_log_probs, objective.sampler_correction, batch.sequence_log_ratios)
    loss_T = policy_T * correction_T

    if divergence_T is not None:
        estimate_T = divergence_T if kd.mix == "none" else mixed(kd, d_T, w_T, divergence_T, batch.teacher_entropies)
    elif kd.estimator in ESTIMATORS:
        estimate_T = ESTIMATORS[kd.estimator](d_T, w_T)
    else:  # no token of the whole batch is distilled, so the teacher scored none
        estimate_T = torch.zeros_like(log_probs_T)
    kd_T = torch.where(distilled_T, estimate_T, 0.0) * kd_weights_T
    if kd.placement == "loss" and beta:
        loss_T = loss_T + beta * kd_T
    drift_T = (log_probs_T.detach() - batch.sampler_log_probs).abs()
    sums = {
        "policy_loss": policy_loss(rho_T, log_probs_T, coefficient_T, objective)[0] * correction_T * batch.policy_weights,
        "kd_loss": kd_T,
        "distilled_tokens": distilled_T,
        "clipped_tokens": clipped_T,
        "drift": drift_T,
        "tokens": torch.ones_like(log_probs_T),
    }
    if divergence_T is None:
        sums |= sampled_divergences(d_T)
    if objective.entropy_bonus and entropies_T is not None:
        loss_T = loss_T - objective.entropy_bonus * entropies_T * batch.policy_weights
    if batch.reference_log_probs is not None:
        reference_d_T, form = batch.reference_log_probs - log_probs_T, objective.reference_kl.estimator
        reference_T = ESTIMATORS[form](reference_d_T, _weight(log_probs_T, batch, form)) * batch.policy_weights
        coefficient = reference_coefficient(objective.combine, objective.reference_kl.coefficient, beta)
        loss_T = loss_T + coefficient * reference_T
        sums["reference_loss"] = reference_T
    sums |= _measures_of_weights(objective, batch, coefficient_T, kd_weights_T, correction_T, w_T, distilled_T)
    return (
        loss_T,
        {name: value.detach().sum(dtype=torch.float32) for name, value in sums.items()},
        {"drift_max": drift_T.max() if len(drift_T) else torch.zeros((), device=drift_T.device)},
    )


def _measures_of_weights(
    objective: ObjectiveConfig,
    batch: TokenBatch,
    coefficient_T: Tensor,
    kd_weights_T: Tensor,
    correction_T: Tensor,
    w_T: Tensor,
    distilled_T: Tensor,
) -> dict[str, Tensor]:
    """What the axes that are on do to the tokens, to be summed: the tokens that are taught, those whose advantage a rule
    changed, and the weights of the corrections with their squares."""
    sums: dict[str, Tensor] = {}
    if objective.combine.kind != "add" or batch.token_weights is not None:
        sums["taught_tokens"] = kd_weights_T != 0
    if objective.combine.kind != "add":
        sums["gated_tokens"] = coefficient_T != batch.advantages
    if objective.sampler_correction.kind != "none":
        sums |= {"correction": correction_T, "correction_squared": correction_T.square(), "corrected_tokens": correction_T != 1}
    if not batch.on_policy and objective.kd.importance != "full":
        weights_T = torch.where(distilled_T, w_T.detach(), 0.0)
        sums |= {"kd_importance": weights_T, "kd_importance_squared": weights_T.square()}
    return sums


def check_functions(objective: ObjectiveConfig) -> None:
    """Load the functions that the configuration names, so that a wrong name is reported before anything is trained.

    Raises:
        ConfigError: one cannot be loaded.
    """
    find_function("objective.combine.kind", objective.combine.kind, RULES)
    find_function("objective.policy_loss", objective.policy_loss, POLICY_LOSSES)
    find_function("objective.kd.token_weight.kind", objective.kd.token_weight.kind, token_weights.RULES)


def mixed(kd: DistillationConfig, d_T: Tensor, w_T: Tensor, divergence_T: Tensor, entropies_T: Tensor | None) -> Tensor:
    """The sampled reverse KL, k2, joined with a divergence over the vocabulary [T].

    `entropy`: k2 everywhere, and the divergence where the teacher's entropy is above `mix_above` (EOPD, arXiv 2603.07079, whose
    k1 inside the surrogate has the same gradient on-policy). `trust`: t k2 + (1 - t) divergence with t = min(T / pi, 1) a
    constant, the expectation of drawing one of the two with probability t (TrOPD, arXiv 2606.01249).
    """
    sampled_T = ESTIMATORS["k2"](d_T, w_T)
    if kd.mix == "entropy":
        # Tokens without a teacher have none, and are masked later.
        unsure_T = torch.zeros_like(d_T).bool() if entropies_T is None else entropies_T > kd.mix_above
        return sampled_T + torch.where(unsure_T, divergence_T, 0.0)
    trust_T = d_T.detach().exp().clamp(max=1.0)
    return trust_T * sampled_T + (1 - trust_T) * divergence_T


def _weight_of_entropies(kd: DistillationConfig, batch: TokenBatch) -> Tensor | None:
    """exp(-rate H_T): SRPO's weight (arXiv 2604.02288), not normalised; None if another rule weighs."""
    if kd.token_weight.kind != "teacher_entropy" or batch.teacher_entropies is None:
        return None
    return (-kd.token_weight.rate * batch.teacher_entropies).exp()


def sampled_divergences(d_T: Tensor) -> dict[str, Tensor]:
    """Per-token estimates of the reverse KL from the log-ratio, for the metrics."""
    return {"kl_k1": -d_T, "kl_k2": 0.5 * d_T.square(), "kl_k3": d_T.expm1() - d_T}


def measured_divergences(d_D: Tensor, divergence_D: Tensor) -> dict[str, Tensor]:
    """The sums that `joint_loss` omits when it is given a divergence, over the D distilled tokens: the sampled estimates, and
    the divergence itself as kl_full."""
    measures = sampled_divergences(d_D) | {"kl_full": divergence_D}
    return {name: value.detach().sum(dtype=torch.float32) for name, value in measures.items()}


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
    sum: both norms, and their cosine (|a + b|^2 - |a|^2 - |b|^2) / (2 |a| |b|), NaN where one of them is zero."""
    product = 2 * policy_norm * distillation_norm
    cosine = (total_norm**2 - policy_norm**2 - distillation_norm**2) / product if product else float("nan")
    return {"grad_norm_policy": policy_norm, "grad_norm_kd": distillation_norm, "grad_cosine": cosine}

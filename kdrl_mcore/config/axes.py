"""Which values of the objective's axes can be combined (docs/method.md, "What combines"), with one-line errors."""

from __future__ import annotations

import math

from kdrl_mcore.config.derived import (
    OVER_THE_VOCABULARY,
    SWITCHES,
    bounds_importance,
    is_on_policy,
    learns_from_reward,
    replays,
    samples,
    truncates,
    uses_given,
    uses_teacher,
)
from kdrl_mcore.config.effects import check_effects
from kdrl_mcore.config.schema import Config, ObjectiveConfig, ScheduleConfig
from kdrl_mcore.errors import ConfigError

OF_LOG_RATIO = ("relu", "modulate", "ratio")
"""The rules of `objective.combine` that use the teacher's log-prob of the sampled token instead of a divergence."""


def check_axes(config: Config) -> None:
    """Refuse values of the objective that contradict each other, or that have no effect in combination.

    Raises:
        ConfigError: the message names both keys.
    """
    objective = config.objective
    _check_combine(config)
    _check_policy(objective)
    _check_correction(config)
    _check_token_weight(objective)
    _check_divergence(objective)
    _check_control_variate(objective)
    _check_group_filter(config)
    _check_given(config)
    _check_support(config)
    check_effects(objective)


def _check_combine(config: Config) -> None:
    objective, kind = config.objective, config.objective.combine.kind
    if kind == "add":
        return
    name = f"objective.combine.kind={kind}"
    if not uses_teacher(objective):
        raise ConfigError(f"{name} combines reward and teacher, but objective.beta is never positive: use combine.kind=add")
    if objective.kd.placement != "loss":
        raise ConfigError(f"{name} itself determines where distillation enters: leave objective.kd.placement at loss")
    if kind in OF_LOG_RATIO and objective.kd.estimator in OVER_THE_VOCABULARY:
        raise ConfigError(
            f"{name} uses the teacher's log-prob of the sampled token, which objective.kd.estimator="
            f"{objective.kd.estimator} does not have: set it to k1 or k2"
        )
    if kind in ("modulate", "ratio"):
        if _largest(objective.beta) > 1:
            raise ConfigError(f"{name} needs objective.beta between 0 and 1: it is the teacher's share of the coefficient")
        if not learns_from_reward(objective):
            raise ConfigError(f"{name} has only a policy loss, but objective.alpha is never positive")
        if config.logging.gradient_split_every:
            raise ConfigError(f"{name} has a single loss: logging.gradient_split_every has nothing to split; set it to 0")
    if kind == "relu":
        if objective.kd.estimator == "k3":
            raise ConfigError(f"{name} weights the log-ratio of the sampled token: set objective.kd.estimator to k1 or k2")
        if objective.combine.signal == "advantage" and not learns_from_reward(objective):
            raise ConfigError(f"{name} with combine.signal=advantage needs advantages: set objective.alpha.init above 0")
        if objective.combine.signal == "correct" and learns_from_reward(objective):
            raise ConfigError(f"{name} has no policy loss: set objective.alpha.init=0, or combine.signal=advantage")
    if kind == "sign" and objective.combine.signal == "advantage" and not learns_from_reward(objective):
        raise ConfigError(f"{name} with combine.signal=advantage needs advantages: set objective.alpha.init above 0")
    if kind == "reference":
        if objective.reference_kl.coefficient:
            raise ConfigError(
                f"{name} sets the coefficient of the KL to the reference itself: leave reference_kl.coefficient at 0"
            )
        if objective.combine.extrapolation != 1 and objective.reference_kl.estimator == "k3":
            raise ConfigError(
                f"{name} needs objective.reference_kl.estimator=k2: on-policy the gradient of k3 is that of the forward KL"
            )


def _check_policy(objective: ObjectiveConfig) -> None:
    if not objective.normalize_by_std and objective.baseline != "group":
        raise ConfigError(
            f"objective.normalize_by_std=false belongs to baseline=group and has no effect with baseline={objective.baseline}"
        )
    if objective.policy_loss == "cispo" and objective.dual_clip is not None:
        raise ConfigError("objective.dual_clip bounds policy_loss=clip; cispo has no ratio in its gradient: leave one out")
    if objective.ratio != "token" and objective.combine.kind == "ratio":
        raise ConfigError("objective.combine.kind=ratio has a separate ratio for each token: leave objective.ratio at token")


def _check_correction(config: Config) -> None:
    correction, kd = config.objective.sampler_correction, config.objective.kd
    if config.objective.clip_against == "sampler" and correction.kind != "none":
        raise ConfigError(
            f"objective.clip_against=sampler has pi/mu in the ratio, so objective.sampler_correction.kind={correction.kind} "
            "would correct for mu again: set it to none"
        )
    if correction.level != "token" and correction.kind == "none":
        raise ConfigError(
            f"objective.sampler_correction.level={correction.level} needs sampler_correction.kind=truncate or mask"
        )
    if correction.level == "geometric" and correction.kind == "truncate":
        raise ConfigError(
            "objective.sampler_correction: a geometric mean cannot weight a sequence: set kind=mask, or level=sequence"
        )
    if not bounds_importance(kd):
        return
    key, default = ("importance", "full") if kd.importance != "full" else ("importance_level", "token")
    name, leave = f"objective.kd.{key}={getattr(kd, key)}", f"leave it at {default}"
    if is_on_policy(config):
        raise ConfigError(f"{name} changes pi/mu, which is 1 where every update trains on its own samples: {leave}")
    if kd.estimator in OVER_THE_VOCABULARY and kd.mix == "none":
        raise ConfigError(f"{name} weights sampled tokens, which objective.kd.estimator={kd.estimator} does not have: {leave}")
    if kd.placement != "loss" or config.objective.combine.kind in ("modulate", "ratio"):
        raise ConfigError(f"{name} weights a distillation loss, and there is none (see kd.placement, combine.kind): {leave}")
    if kd.importance_level == "geometric" and kd.importance != "mask":
        raise ConfigError(
            "objective.kd.importance_level=geometric: a geometric mean cannot weight a sequence: set importance=mask, or "
            "importance_level=sequence"
        )


def _check_token_weight(objective: ObjectiveConfig) -> None:
    weight, kd = objective.kd.token_weight, objective.kd
    if weight.kind == "constant":
        if weight.normalize:
            raise ConfigError("objective.kd.token_weight.normalize=true has nothing to scale with kind=constant")
        if weight.over != "response":
            raise ConfigError("objective.kd.token_weight.over=batch has nothing to choose with kind=constant")
        return
    name = f"objective.kd.token_weight.kind={weight.kind}"
    if not uses_teacher(objective) or objective.combine.kind in ("modulate", "ratio"):
        raise ConfigError(f"{name} weights the tokens of a distillation loss, and there is none: set it to constant")
    if kd.placement == "reward":
        raise ConfigError(f"{name} does not reach objective.kd.placement=reward, which sums over the response")
    if weight.over == "batch" and weight.kind not in ("entropy", "magnitude"):
        raise ConfigError(f"{name} has no shares of a batch: leave objective.kd.token_weight.over at response")
    if weight.kind == "prefix" and weight.tokens and weight.share != 0.5:
        raise ConfigError("objective.kd.token_weight: tokens and share are both set; leave one out")


def _check_divergence(objective: ObjectiveConfig) -> None:
    kd = objective.kd
    if kd.divergence != "reverse" and kd.estimator not in ("exact", "top_k"):
        raise ConfigError(
            f"objective.kd.divergence={kd.divergence} is computed over the vocabulary: set objective.kd.estimator=exact or "
            "top_k"
        )
    if kd.clamp is not None and kd.estimator in OVER_THE_VOCABULARY and kd.mix == "none":
        raise ConfigError(
            f"objective.kd.clamp={kd.clamp:g} clamps the log-ratio of the sampled token, which objective.kd.estimator="
            f"{kd.estimator} does not use: set it to null"
        )
    if kd.estimator == "top_k" and kd.divergence != "reverse" and kd.top_k_tail == "corrected":
        raise ConfigError("objective.kd.top_k_tail=corrected belongs to divergence=reverse: set it to bucket")
    if kd.mix != "none" and kd.divergence != "forward":
        raise ConfigError(
            f"objective.kd.mix={kd.mix} joins the sampled reverse KL and a forward one: set objective.kd.divergence=forward"
        )
    if kd.estimator == "top_k" and kd.divergence == "forward" and (kd.top_k_support, kd.top_k_tail) == ("student", "truncate"):
        raise ConfigError(
            "objective.kd.top_k_tail=truncate of a forward KL on the student's set is not a divergence: set "
            "objective.kd.top_k_support=teacher, or the tail to bucket"
        )


def _check_control_variate(objective: ObjectiveConfig) -> None:
    """A baseline leaves the expected gradient unchanged only if no factor that multiplies it depends on the sampled token."""
    kd = objective.kd
    if not kd.control_variate:
        return
    name, leave = "objective.kd.control_variate=true", "set it to false"
    if not uses_teacher(objective):
        raise ConfigError(f"{name} belongs to a distillation loss, and there is none: {leave}")
    if kd.estimator not in ("k1", "k2"):
        raise ConfigError(f"{name} is for objective.kd.estimator=k1 or k2, not {kd.estimator}: {leave}")
    if kd.placement == "reward":
        raise ConfigError(f"{name} does not reach objective.kd.placement=reward, which sums over the response: {leave}")
    for key, value, harmless in (
        ("importance", kd.importance, ("full",)),
        ("importance_level", kd.importance_level, ("token",)),
        ("mask", kd.mask, ("none",)),
        ("token_weight.kind", kd.token_weight.kind, ("constant", "prefix", "rising", "teacher_entropy")),
        ("combine.kind", objective.combine.kind, ("add", "reference")),
    ):
        if value not in harmless:
            key = key if key.startswith("combine") else f"kd.{key}"
            raise ConfigError(f"{name} would bias the gradient: objective.{key}={value} depends on the sampled token: {leave}")


def _check_group_filter(config: Config) -> None:
    settings, objective = config.rollout.group_filter, config.objective
    if not settings.rounds:
        if settings.others != "drop":
            raise ConfigError("rollout.group_filter.others=teach needs rollout.group_filter.rounds above 0")
        return
    name = f"rollout.group_filter.rounds={settings.rounds}"
    if not samples(config):
        raise ConfigError(f"{name} samples further prompts, and this run samples none: set it to 0")
    if not learns_from_reward(objective):
        raise ConfigError(f"{name} looks for groups whose rewards differ, but objective.alpha is never positive: set it to 0")
    if settings.others == "teach" and not uses_teacher(objective):
        raise ConfigError("rollout.group_filter.others=teach needs a teacher: set objective.beta above 0, or others=drop")


def _check_given(config: Config) -> None:
    given, objective = config.rollout.given, config.objective
    if not given.share:
        if given.path is not None:
            raise ConfigError(f"rollout.given.path={given.path} needs rollout.given.share above 0")
        return
    name, kd = f"rollout.given.share={given.share:g}", objective.kd
    if not uses_teacher(objective):
        raise ConfigError(f"{name} distils given responses, but objective.beta is never positive: set it to 0")
    if replays(config) and given.path is None:
        raise ConfigError(
            f"{name} uses responses of the training data, which rollout=replay does not read: set rollout.given.path"
        )
    if kd.estimator not in ("exact", "top_k") or kd.mix != "none":
        now = f"estimator={kd.estimator}" if kd.mix == "none" else f"mix={kd.mix}"
        raise ConfigError(
            f"{name} needs a divergence that does not depend on sampling, and objective.kd.{now} does: set "
            "objective.kd.estimator=exact or top_k, and kd.mix=none"
        )
    if objective.combine.kind not in ("add", "gate"):
        raise ConfigError(
            f"{name} has responses without a verdict or an advantage, which objective.combine.kind={objective.combine.kind} "
            "needs: set it to add or gate"
        )
    if kd.token_weight.kind == "pass_rate":
        raise ConfigError(
            f"{name} has responses without a verdict, which objective.kd.token_weight.kind=pass_rate needs: change one"
        )


def _check_support(config: Config) -> None:
    """A truncated student gives tokens probability 0, where only the reverse KL over its own tokens is finite."""
    if not truncates(config):
        return
    rollout, kd = config.rollout, config.objective.kd
    settings = {"top_p": (rollout.top_p, 1.0), "top_k": (rollout.top_k, 0), "min_p": (rollout.min_p, 0.0)}
    name, off = next((f"rollout.{key}={now:g}", f"{off:g}") for key, (now, off) in settings.items() if now != off)
    why = f"{name} truncates the student's distribution"
    if uses_given(config):
        raise ConfigError(f"{why}, which may leave out given responses: set it to {off}, or rollout.given.share=0")
    if not uses_teacher(config.objective):
        return
    if kd.estimator in ("top_k", "top_k_unbiased"):
        raise ConfigError(
            f"{why}, for which objective.kd.estimator={kd.estimator} is not defined: set it to {off}, or the estimator to k1, "
            "k2, k3 or exact"
        )
    if kd.divergence != "reverse":
        raise ConfigError(
            f"{why}, and objective.kd.divergence={kd.divergence} needs all of it: set it to {off}, or the divergence to reverse"
        )


def _largest(schedule: ScheduleConfig) -> float:
    """An upper bound of the coefficient."""
    if schedule.delta < 0 and schedule.kind in ("linear", *SWITCHES):
        return math.inf
    if ":" in schedule.kind:
        return 0.0  # a user's function is responsible for its own bounds
    if schedule.kind in SWITCHES:
        return max(schedule.init, schedule.after, schedule.min)
    return schedule.max if schedule.kind == "adaptive" else max(schedule.init, schedule.min)

"""How much the log-probs of sampler and trainer may differ: one rule for the self-test, the check of each step and the
alerts."""

from __future__ import annotations

from collections.abc import Mapping

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import (
    has_several_teachers,
    is_on_policy,
    is_supervised,
    learns_from_reward,
    samples,
    truncates,
    uses_teacher,
)
from kdrl_mcore.errors import NumericalError
from kdrl_mcore.monitoring.alerts import DEFAULT_THRESHOLDS, AlertThresholds

DRIFT_BOUNDS = {"float32": 1e-3, "bfloat16": 0.25}
"""Default of `rollout.max_log_prob_drift`, nats: decoding with a cache adds in a different order than the trainer's forward
pass, and bfloat16 rounds logits of 32 to 0.125."""
MEAN_DRIFT_BOUND = DEFAULT_THRESHOLDS.drift_mean
"""In bfloat16 a single token proves nothing, because its difference depends on the model's logits and the noise of its layers.
The mean does: rounding gave 0.006 to 0.010 nats (at most 0.03 on a token) in models of 4 to 12 layers and widths of 64 to 512,
a temperature of 1.2 instead of 1.0 gave 0.13 to 0.16, and one halved matrix of the last layer 0.06 to 0.12 (0.19 on a
token)."""


def each_token_counts(config: Config) -> bool:
    """Whether one token's difference can be a fault: in float32, or if the user sets a bound for single tokens."""
    return config.model.dtype == "float32" or config.rollout.max_log_prob_drift is not None


def _each_token_of_a_step_counts(config: Config) -> bool:
    return each_token_counts(config) and (not truncates(config) or config.rollout.max_log_prob_drift is not None)


def drift_bound(config: Config) -> float:
    """The largest difference between a sampler's and the trainer's log-prob of one token that counts as rounding, nats."""
    given = config.rollout.max_log_prob_drift
    return DRIFT_BOUNDS[config.model.dtype] if given is None else given


def check_drift(config: Config, step: int, metrics: Mapping[str, float]) -> None:
    """Check that the log-probs of a training step agree with the sampler's, if both have the same weights.

    As in the self-test, the largest difference counts or, in bfloat16, the mean. By default the mean also counts for a
    truncated distribution: rounding decides whether a token at its edge belongs to it, which changes the log-probs of all
    others.

    Raises:
        NumericalError: they differ; on all ranks, because all have the same metrics.
    """
    if not is_on_policy(config):
        return
    by_token = _each_token_of_a_step_counts(config)
    name, bound = ("drift_max", drift_bound(config)) if by_token else ("drift_mean", MEAN_DRIFT_BOUND)
    if metrics.get(name, 0.0) > bound:
        raise NumericalError(
            f"step {step}: the log-probs of sampler and trainer differ by {metrics['drift_mean']:.3g} nats on average and up "
            f"to {metrics['drift_max']:.3g} on one token ({name} may be {bound:g}): the sampler's weights or temperature "
            "differ from the student's; if this is rounding, raise rollout.max_log_prob_drift"
        )


def alert_thresholds(config: Config) -> AlertThresholds:
    """The thresholds of the run's alerts: which alerts apply to this kind of run, and how much drift is a fault in it.

    If the student samples for itself and makes one update per batch, sampler and trainer must agree up to rounding at every
    step, so any larger drift is a fault rather than a property of a different engine.
    """
    drift_max = DEFAULT_THRESHOLDS.drift_max
    if not _each_token_of_a_step_counts(config):
        drift_max = float("inf")
    elif config.rollout.engine == "megatron" and is_on_policy(config):
        drift_max = drift_bound(config)
    return AlertThresholds(
        drift_max=drift_max,
        sampled=samples(config),
        has_sampler=not is_supervised(config.objective),
        rewarded=learns_from_reward(config.objective),
        distilled=uses_teacher(config.objective),
        teachers=tuple(config.teachers) if has_several_teachers(config) else (),
    )

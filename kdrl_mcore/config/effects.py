"""Settings of the objective that have an effect only with certain values of another key. Otherwise they are refused, because
they usually mean that the other key was forgotten."""

from __future__ import annotations

from functools import reduce
from typing import Any

from kdrl_mcore.config.derived import SWITCHES, uses_teacher
from kdrl_mcore.config.schema import ObjectiveConfig
from kdrl_mcore.errors import ConfigError

WITH: dict[tuple[str, str], tuple[str, ...]] = {
    ("combine.signal", "combine.kind"): ("sign", "relu"),
    ("combine.agree", "combine.kind"): ("sign",),
    ("combine.differ", "combine.kind"): ("sign",),
    ("combine.clip", "combine.kind"): ("modulate",),
    ("combine.bounds", "combine.kind"): ("modulate",),
    ("combine.extrapolation", "combine.kind"): ("reference",),
    ("kd.jsd_beta", "kd.divergence"): ("jsd",),
    ("kd.entry_clip", "kd.estimator"): ("exact",),
    ("kd.entry_clip", "kd.divergence"): ("forward",),
    ("kd.mix_above", "kd.mix"): ("entropy",),
    ("kd.importance_bound", "kd.importance"): ("truncate", "mask"),
    ("kd.top_k", "kd.estimator"): ("top_k", "top_k_unbiased"),
    ("kd.top_k_support", "kd.estimator"): ("top_k",),
    ("kd.top_k_tail", "kd.estimator"): ("top_k",),
    ("kd.token_weight.share", "kd.token_weight.kind"): ("entropy", "magnitude", "prefix"),
    ("kd.token_weight.more", "kd.token_weight.kind"): ("entropy",),
    ("kd.token_weight.tokens", "kd.token_weight.kind"): ("prefix",),
    ("kd.token_weight.rate", "kd.token_weight.kind"): ("teacher_entropy", "trusted_prefix"),
    ("kd.token_weight.low", "kd.token_weight.kind"): ("rising",),
    ("kd.token_weight.middle", "kd.token_weight.kind"): ("rising",),
    ("kd.token_weight.width", "kd.token_weight.kind"): ("rising",),
    ("kd.token_weight.solved", "kd.token_weight.kind"): ("pass_rate",),
    ("kd.token_weight.unsolved", "kd.token_weight.kind"): ("pass_rate",),
    ("clip_low", "policy_loss"): ("clip",),
    ("sampler_correction.bound", "sampler_correction.kind"): ("truncate", "mask"),
    **{
        (f"{schedule}.{key}", f"{schedule}.kind"): kinds
        for schedule in ("alpha", "beta")
        for key, kinds in {
            "min": ("linear", "cosine", "adaptive", *SWITCHES),
            "max": ("adaptive",),
            "delta": ("linear", *SWITCHES),
            "steps": ("cosine", "switch"),
            "after": SWITCHES,
            "target": ("adaptive", "below"),
            "drop": ("below",),
            "ramp": ("below",),
            "patience": ("plateau",),
            "eta": ("adaptive",),
        }.items()
    },
}
"""(a key of `objective`, the key that decides whether it has an effect): the values of the latter with which it has. A user's
function, MODULE:NAME, may read every setting."""


def check_effects(objective: ObjectiveConfig) -> None:
    """Refuse settings that are not at their defaults and have no effect. Those of distillation are not checked without a
    teacher, so that `objective=grpo` can be compared with other presets under the same settings.

    Raises:
        ConfigError: the message names the settings and the key on which they depend.
    """
    useless: dict[str, list[str]] = {}
    for (key, decider), values in WITH.items():
        if key.startswith(("kd.", "combine.")) and not uses_teacher(objective):
            continue
        chosen = _value(objective, decider)
        if _value(objective, key) != _value(ObjectiveConfig(), key) and chosen not in values and ":" not in chosen:
            useless.setdefault(decider, []).append(key)
    for decider, keys in useless.items():
        settings = ", ".join(f"objective.{key}={_value(objective, key)}" for key in keys)
        kinds = dict.fromkeys(kind for key in keys for kind in WITH[key, decider])
        has, it = ("has", "it") if len(keys) == 1 else ("have", "them")
        raise ConfigError(
            f"{settings} {has} no effect with objective.{decider}={_value(objective, decider)}: leave {it} at the default, or "
            f"set {decider} to {' or '.join(kinds)}"
        )
    reference = objective.reference_kl
    if reference.estimator != "k3" and not reference.coefficient and objective.combine.kind != "reference":
        raise ConfigError(
            f"objective.reference_kl.estimator={reference.estimator} has no effect with objective.reference_kl.coefficient=0: "
            "leave it at the default, or set the coefficient"
        )


def _value(objective: ObjectiveConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), objective)

"""A setting of the objective that nothing reads is refused in one line that names the key on which it depends."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.config.effects import WITH, check_effects
from kdrl_mcore.config.keys import CHOICES
from kdrl_mcore.config.schema import ObjectiveConfig
from kdrl_mcore.errors import ConfigError


def value_of(objective: ObjectiveConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), objective)


def with_value(objective: ObjectiveConfig, key: str, value: Any) -> ObjectiveConfig:
    *sections, last = key.split(".")
    setattr(reduce(getattr, sections, objective), last, value)
    return objective


def distilling() -> ObjectiveConfig:
    return with_value(ObjectiveConfig(), "beta.init", 1.0)


def another(key: str) -> Any:
    """A value other than the default."""
    default = value_of(ObjectiveConfig(), key)
    if isinstance(default, str):
        return next(choice for choice in CHOICES[f"objective.{key}"] if choice != default)
    return 1.0 if default is None else default + 1


@pytest.mark.parametrize(("key", "decider"), WITH, ids=[key for key, _ in WITH])
def test_it_is_refused_unless_the_key_that_it_depends_on_has_a_fitting_value(key: str, decider: str) -> None:
    fitting = WITH[key, decider]
    others = {other: values[0] for (each, other), values in WITH.items() if each == key and other != decider}
    for chosen in (*CHOICES[f"objective.{decider}"], "my_rules:own"):
        objective = with_value(with_value(distilling(), key, another(key)), decider, chosen)
        for other, value in others.items():
            with_value(objective, other, value)
        if chosen in fitting or ":" in chosen:
            check_effects(objective)
            continue
        with pytest.raises(ConfigError) as raised:
            check_effects(objective)
        message = str(raised.value)
        assert f"objective.{key}=" in message and f"no effect with objective.{decider}={chosen}" in message
        assert message.endswith(f"set {decider} to {' or '.join(fitting)}") and "\n" not in message


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            "objective=kdrl_annealing objective.beta.kind=constant",
            "objective.beta.min=0.001, objective.beta.delta=5e-05 have no effect with objective.beta.kind=constant: leave",
        ),
        ("objective=grpo objective.alpha.steps=5", "set alpha.kind to cosine or switch"),
        ("objective=cispo objective.clip_low=0.1", "no effect with objective.policy_loss=cispo"),
        ("objective=kdrl objective.reference_kl.estimator=k2", "no effect with objective.reference_kl.coefficient=0"),
    ],
)
def test_the_line_names_all_that_depends_on_one_key(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(["student.path=s", "teacher.path=t", *settings.split()])
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_without_a_teacher_the_settings_of_distillation_may_stay() -> None:
    load_config(["objective=grpo", "student.path=s", "objective.kd.top_k=8", "objective.combine.agree=2"])

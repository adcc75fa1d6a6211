"""Checks of the settings of several teachers (`teachers.NAME`), and of their mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdrl_mcore.config.derived import (
    DISTRIBUTION,
    DOMAIN,
    ENTROPIES,
    TEACHER,
    bounds_importance,
    can_be_positive,
    domain_name,
    evaluates,
    is_served,
    may_teach_together,
    replays,
    uses_teacher,
    wanted_scores,
    weighs_by_scores,
)
from kdrl_mcore.config.keys import nearest
from kdrl_mcore.config.schema import Config, NamedTeacherConfig, TeacherConfig
from kdrl_mcore.config.teachers import check_teacher_prompt
from kdrl_mcore.errors import ConfigError


def check_teachers(config: Config) -> None:
    """Check the settings of `teachers`.

    Raises:
        ConfigError: the message names the key.
    """
    if not config.teachers:
        return
    teacher = config.teacher
    if teacher != replace(TeacherConfig(), score_while_sampling=teacher.score_while_sampling):
        raise ConfigError(
            "teacher and teachers are both set: name one teacher, or several in teachers.NAME (of `teacher` only "
            "score_while_sampling concerns these)"
        )
    domains = [domain_name(source) for source in config.data.sources]
    for name, each in config.teachers.items():
        section = f"teachers.{name}"
        if not each.path and not is_served(each):
            raise ConfigError(f"{section}.path is not set: name the teacher, or its servers in {section}.server")
        if name == TEACHER:
            raise ConfigError(f"{section}: choose another name than {TEACHER}, which is that of an only teacher")
        check_teacher_prompt(each.prompt, f"{section}.prompt")
        if not can_be_positive(each.share):
            raise ConfigError(f"{section}.share is never positive: leave this teacher out, or set {section}.share.init")
        if each.share.kind == "plateau" and not (evaluates(config) and config.eval.every > 0):
            raise ConfigError(
                f"{section}.share.kind=plateau watches eval/accuracy: set eval.every and something to evaluate on"
            )
        _check_taught_values(config, section, each, domains)
    if uses_teacher(config.objective):
        _check_mixture(config)


def _check_taught_values(config: Config, section: str, teacher: NamedTeacherConfig, domains: Sequence[str]) -> None:
    column = f"{section}.column={teacher.column}"
    if len(set(teacher.values)) < len(teacher.values):
        raise ConfigError(f"{section}.values names a value twice: leave one out")
    if not teacher.values:
        if teacher.column != DOMAIN:
            raise ConfigError(f"{column} without {section}.values teaches every prompt: name the values, or leave column out")
        return
    if teacher.column != DOMAIN and teacher.column not in config.data.columns:
        raise ConfigError(f"{column} is not among the columns that are read: add it to data.columns")
    if teacher.column != DOMAIN and replays(config):
        raise ConfigError(f"{column}: rollout files hold no columns of the data; with rollout=replay choose by domain")
    if teacher.column != DOMAIN or DOMAIN in config.data.columns or replays(config):
        return
    if not domains:
        raise ConfigError(f"{section}.values are domains, but the data have none: name them in data.sources")
    for value in teacher.values:
        if value not in domains:
            there = f"there are: {', '.join(domains)}{nearest(value, domains)}"
            raise ConfigError(f"{section}.values: no domain of data.sources is called '{value}'; {there}")


def _check_mixture(config: Config) -> None:
    """Check the settings that cannot be computed exactly where several teachers teach one prompt, or where their shares make
    beta differ by prompt."""
    objective, kd = config.objective, config.objective.kd
    if objective.combine.kind in ("modulate", "ratio", "reference"):
        raise ConfigError(
            f"objective.combine.kind={objective.combine.kind} has one beta for all prompts, which the shares of teachers would "
            "make differ: use another rule, or one teacher"
        )
    if not may_teach_together(config):
        return
    together = "several teachers may teach one prompt"
    over = "control_variate=true" if kd.control_variate else f"estimator={kd.estimator}"
    if kd.mixture == "arithmetic":
        if DISTRIBUTION in wanted_scores(objective):
            raise ConfigError(
                f"{together}, and with objective.kd.mixture=arithmetic only k1, k2 and k3 are exact, not objective.kd.{over}: "
                "set mixture=geometric, or give each prompt one teacher"
            )
        if ENTROPIES in wanted_scores(objective):
            raise ConfigError(
                f"{together}, and objective.kd.token_weight.kind={kd.token_weight.kind} needs the entropy of their mixture, "
                "which does not follow from theirs: use another rule, or give each prompt one teacher"
            )
        return
    needs_log_probs = {
        f"kd.token_weight.kind={kd.token_weight.kind}": weighs_by_scores(objective)
        or kd.token_weight.kind == "teacher_entropy",
    }
    if DISTRIBUTION not in wanted_scores(objective):  # otherwise the mixture is formed over the vocabulary
        needs_log_probs |= {
            f"kd.estimator={kd.estimator}": kd.estimator not in ("k1", "k2"),
            f"kd.placement={kd.placement}": kd.placement == "reward",
            f"kd.clamp={kd.clamp}": kd.clamp is not None,
            f"kd.importance={kd.importance}": bounds_importance(kd),
            f"combine.kind={objective.combine.kind}": objective.combine.kind not in ("add", "gate"),
        }
    for key, needs in needs_log_probs.items():
        if needs:
            raise ConfigError(
                f"{together}, and objective.{key} needs the log-probs of their normalised geometric mixture, which k1 and k2 "
                "do without: set objective.kd.mixture=arithmetic, or give each prompt one teacher"
            )

"""Checks of the teacher's settings: its weights, its prompt, and recorded scores."""

from __future__ import annotations

from dataclasses import asdict

from kdrl_mcore.config.derived import (
    DISTRIBUTION,
    has_separate_teacher,
    is_served,
    replays,
    teaches_itself,
    uses_given,
    uses_teacher,
    wanted_scores,
)
from kdrl_mcore.config.schema import Config, TeacherConfig, TeacherParallelConfig, TeacherPromptConfig
from kdrl_mcore.errors import ConfigError


def check_teacher(config: Config) -> None:
    """Refuse settings of `teacher` that contradict each other or have no effect.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    teacher, prompt = config.teacher, config.teacher.prompt
    name = f"teacher.weights={teacher.weights}"
    if has_separate_teacher(config) and not teacher.path and not is_served(teacher) and not config.teachers:
        raise ConfigError(
            "objective.beta is positive but teacher.path is not set: name the teacher, let the student teach itself "
            "(teacher.weights), ask a server (teacher.server), or use objective=grpo"
        )
    if teacher.weights != "path":
        if not uses_teacher(config.objective):
            raise ConfigError(f"{name} teaches, but objective.beta is never positive: leave it at path")
        if teacher.weights == "adapters" and not teacher.path:
            raise ConfigError(f"{name} are those in a PEFT folder: name it with teacher.path")
        if teacher.path and teaches_itself(config) and teacher.weights != "adapters":
            raise ConfigError(f"{name} are the student's own, and teacher.path={teacher.path} is not read: leave one out")
        if teacher.weights in ("base", "adapters") and config.student.lora.rank == 0:
            raise ConfigError(
                f"{name} needs the frozen weights of student.lora, but student.lora.rank=0: set the rank, or other weights"
            )
        if prompt.template == "student" and teacher.weights == "present":
            raise ConfigError(
                f"{name} with the student's own prompt is the student itself: set teacher.prompt.template, or other weights"
            )
        if teacher.parallel != TeacherParallelConfig():
            raise ConfigError(f"{name} has no separate layout: leave teacher.parallel alone")
        if teacher.score_while_sampling:
            raise ConfigError(f"{name} score only between sampling and training: set teacher.score_while_sampling=false")
    if teacher.weights == "recorded":
        _check_recorded(config)
    for key, kind in (("decay", "average"), ("refresh_every", "refreshed"), ("min_ess", "recorded")):
        if getattr(teacher, key) != getattr(TeacherConfig, key) and teacher.weights != kind:
            raise ConfigError(f"teacher.{key}={getattr(teacher, key):g} belongs to teacher.weights={kind}: leave it out")
    check_teacher_prompt(prompt, "teacher.prompt")
    if prompt.template != "student" and not uses_teacher(config.objective):
        raise ConfigError(
            f"teacher.prompt.template={prompt.template} is read by no teacher: set objective.beta, or leave it out"
        )


def check_teacher_prompt(prompt: TeacherPromptConfig, section: str) -> None:
    """Check what a teacher reads before a response, whose settings are in `section`.

    Raises:
        ConfigError: a setting has no effect.
    """
    used = {"student": (), "plain": ("plain_template", "max_tokens"), "chat": tuple(asdict(prompt))}[prompt.template]
    for key, default in asdict(TeacherPromptConfig()).items():
        if key not in ("template", *used) and getattr(prompt, key) != default:
            raise ConfigError(
                f"{section}.{key} has no effect with {section}.template={prompt.template}: set the template, or leave it out"
            )
    if prompt.template == "chat" and prompt.plain_template != TeacherPromptConfig.plain_template:
        raise ConfigError(f"{section}.plain_template belongs to {section}.template=plain: leave one out")


def _check_recorded(config: Config) -> None:
    name, kd = "teacher.weights=recorded", config.objective.kd
    if not replays(config):
        raise ConfigError(f"{name} reads scores from a rollout file: set rollout=replay and rollout.path")
    if DISTRIBUTION in wanted_scores(config.objective):
        key = "control_variate=true" if kd.control_variate else f"estimator={kd.estimator}"
        raise ConfigError(
            f"{name} has the teacher's log-probs of the sampled tokens only, but objective.kd.{key} needs its whole "
            "distribution: set objective.kd.estimator to k1, k2 or k3, without control_variate"
        )
    if uses_given(config):
        raise ConfigError(f"{name} has no scores of given responses: set rollout.given.share=0")

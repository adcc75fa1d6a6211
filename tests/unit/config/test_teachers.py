"""The teacher's settings: one that contradicts another or has no effect is refused in one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrl_mcore.config import load_config, save_config
from kdrl_mcore.config.derived import (
    has_separate_teacher,
    keeps_earlier_weights,
    shares_teacher_head,
    teacher_prompt_tokens,
    teaches_itself,
    used_models,
    wanted_scores,
)
from kdrl_mcore.errors import ConfigError

SELF = "teacher.path=null teacher.prompt.template=chat teacher.weights"
PROMPT = "teacher.prompt"


def load(settings: str):
    return load_config(["objective=kdrl", "student.path=s", "teacher.path=t", *settings.split()])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("teacher.path=null", "name the teacher, let the student teach itself (teacher.weights)"),
        ("teacher.weights=average", "teacher.path=t is not read: leave one out"),
        ("teacher.path=null teacher.weights=present", "is the student itself: set teacher.prompt.template"),
        (f"objective=grpo {SELF}=start", "objective.beta is never positive: leave it at path"),
        (f"{SELF}=average teacher.parallel.tensor=2", "leave teacher.parallel alone"),
        (
            f"{SELF}=average teacher.score_while_sampling=true rollout=vllm rollout.vllm.placement=server",
            "set teacher.score_while_sampling=false",
        ),
        (f"{SELF}=start teacher.decay=0.9", "teacher.decay=0.9 belongs to teacher.weights=average"),
        (f"{SELF}=average teacher.refresh_every=3", "teacher.refresh_every=3 belongs to teacher.weights=refreshed"),
        (f"{PROMPT}.max_tokens=9", "teacher.prompt.max_tokens has no effect with teacher.prompt.template=student"),
        (f"{PROMPT}.template=plain {PROMPT}.system_prompt=x", "teacher.prompt.system_prompt has no effect"),
        (f"{PROMPT}.template=chat {PROMPT}.plain_template=x", "belongs to teacher.prompt.template=plain"),
        (f"objective=grpo {PROMPT}.template=chat", "is read by no teacher"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(settings)
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_the_student_is_its_own_teacher() -> None:
    config = load(f"{SELF}=refreshed {PROMPT}.max_tokens=99")
    assert teaches_itself(config) and keeps_earlier_weights(config) and not has_separate_teacher(config)
    assert used_models(config) == {"student": "s"} and teacher_prompt_tokens(config) == 99
    assert not keeps_earlier_weights(load(f"{SELF}=present"))


@pytest.mark.parametrize(
    ("settings", "shared"),
    [
        (f"{SELF}=present", True),
        (f"{SELF}=present batch.updates_per_step=2", False),  # the second update's head is not the teacher's
        (f"{SELF}=start", False),
        (f"{SELF}=start student.lora.rank=8", True),
        (f"{SELF}=base student.lora.rank=8 batch.updates_per_step=2", True),
        ("student.lora.rank=8", False),
        ("teacher.weights=path batch.updates_per_step=1", False),
    ],
)
def test_the_teacher_has_the_students_head_where_neither_changes(settings: str, shared: bool) -> None:
    assert shares_teacher_head(load(settings)) == shared


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("objective=grpo", set()),
        ("", {"log_probs"}),
        ("objective.kd.token_weight.kind=teacher_entropy", {"log_probs", "entropies"}),
        ("objective.kd.estimator=exact", {"distribution"}),
        ("objective.kd.control_variate=true", {"distribution"}),
        ("objective.kd.estimator=top_k objective.kd.token_weight.kind=magnitude", {"distribution", "log_probs"}),
    ],
)
def test_what_a_teacher_is_asked_for_follows_from_the_objective(settings: str, wanted: set[str]) -> None:
    assert wanted_scores(load(settings).objective) == wanted


def test_templates_come_from_files_and_go_back_into_one(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("@ {prompt}\nThe answer is {answer}.\n")
    config = load(f"{SELF}=present {PROMPT}.message_template=@{tmp_path}/t.txt")
    assert config.teacher.prompt.message_template == "@ {prompt}\nThe answer is {answer}.\n"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("", "set rollout=replay and rollout.path"),
        ("rollout=replay rollout.path=r objective.kd.estimator=exact", "objective.kd.estimator=exact needs its whole"),
        ("rollout=replay rollout.path=r objective.kd.control_variate=true", "objective.kd.control_variate=true needs"),
        ("rollout=replay rollout.path=r teacher.parallel.tensor=2", "leave teacher.parallel alone"),
    ],
)
def test_what_recorded_scores_do_not_have_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(f"teacher.weights=recorded {settings}")
    assert told in str(raised.value) and "\n" not in str(raised.value)

"""Build the models that a run compares the student with: its teachers and the reference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from kdrl_mcore.build_data import OnPhase, TrainingData
from kdrl_mcore.config import Config, NamedTeacherConfig, TeacherConfig, TeacherParallelConfig
from kdrl_mcore.config.derived import (
    TEACHER,
    compares_over_vocabulary,
    is_served,
    knows_top_k,
    prompts_of_teachers,
    reads_own_prompt,
    reads_scores,
    separate_teachers,
    served_teachers,
    teacher_heads,
    teaches_itself,
    uses_reference,
    uses_teacher,
)
from kdrl_mcore.data.vocabulary import named_tokens, stop_tokens
from kdrl_mcore.model.lora import TEACHER_ADAPTER
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.student.frozen_base import FrozenBase
from kdrl_mcore.student.self_teacher import SelfTeacher
from kdrl_mcore.student.student import Student
from kdrl_mcore.teacher.connect import connect_teacher
from kdrl_mcore.teacher.pool import Member, TeacherPool
from kdrl_mcore.teacher.recorded import read_recorded
from kdrl_mcore.teacher.served import ServedTeacher
from kdrl_mcore.teacher.source import ScoreSource
from kdrl_mcore.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


def build_teacher(
    config: Config,
    student: Student,
    data: TrainingData,
    on_phase: OnPhase,
    on_progress: Callable[[], None] = lambda: None,
) -> ScoreSource | None:
    """The teacher, or None if the loss has no distillation term. If the loss compares both models over the vocabulary, the
    student also loads the teacher's head. Collective over the world."""
    if not uses_teacher(config.objective):
        return None
    kd, name = config.objective.kd, TEACHER if reads_own_prompt(config) else None
    if kd.clamp is not None and dist.get_rank() == 0:
        logger.warning("objective.kd.clamp=%g: tokens with a larger log-ratio have no gradient", kd.clamp)
    if reads_scores(config):
        assert config.rollout.path is not None
        return read_recorded(config.rollout.path, config, data.vocab_size)
    if teaches_itself(config):
        if compares_over_vocabulary(config.objective):
            student.use_own_head_as_teachers()
        if config.teacher.weights == "adapters":
            assert config.teacher.path is not None
            student.add_teacher_adapters(config.teacher.path)
            return FrozenBase(student, name, TEACHER_ADAPTER)
        return FrozenBase(student, name) if config.teacher.weights == "base" else SelfTeacher(student, name)
    if heads := teacher_heads(config):
        student.load_teacher_head([str(each.path) for each in heads.values()], kd)
    elif knows_top_k(config):
        student.expect_known_top_k()
    sources = {each: _separate(config, each, student, data, on_phase, on_progress) for each in separate_teachers(config)}
    if not config.teachers:
        return sources[TEACHER]
    members = {}
    for each, settings in config.teachers.items():
        source = sources[each]
        rows = source.rows if isinstance(source, ServedTeacher) else None
        size = source.parts.config.hidden_size if isinstance(source, Teacher) else 0 if rows is None else rows.width
        members[each] = Member(settings, Coefficient(settings.share), source, size)
    return TeacherPool(members, kd.mixture, known_top_k=knows_top_k(config))


def _separate(
    config: Config, name: str, student: Student, data: TrainingData, on_phase: OnPhase, on_progress: Callable[[], None]
) -> Teacher | ServedTeacher:
    """A teacher that is another model than the student, in this job or on servers."""
    settings = separate_teachers(config)[name]
    if is_served(settings):
        on_phase("connect teacher")
        return connect_teacher(
            config,
            name,
            student.groups,
            data.tokenizer,
            data.vocab_size,
            unshared=data.unshared.get(name, ()),
            on_wait=partial(on_phase, "connect teacher"),
            on_progress=on_progress,
        )
    assert settings.path is not None
    reads = name if name in prompts_of_teachers(config) else None
    return _frozen(settings.path, settings, config, data.vocab_size, partial(on_phase, "load teacher"), reads)


def masks_stop_token(config: Config) -> bool:
    """Whether the token that ends a response is left out of distillation. A teacher that ends its responses with another token
    gives the student's end token almost no probability: distilling it would teach the student never to stop."""
    rule, objective = config.objective.kd.stop_token, config.objective
    if rule != "auto" or not uses_teacher(objective):
        return rule == "mask"
    paths = [each.path for each in config.teachers.values()] or [config.teacher.path]
    named = [path for path in paths if path is not None or served_teachers(config)]
    ends_otherwise = [_ends_otherwise(config, path) for path in named]  # each teacher is reported
    return any(ends_otherwise)


def _ends_otherwise(config: Config, path: str | None) -> bool:
    """Whether a teacher ends its responses with another token than the student. Rank 0 reports it.

    Args:
        path: the teacher's folder; None for one on servers whose folder is not named.
    """
    assert config.student.path is not None
    student, teacher = stop_tokens(config.student.path), None if path is None else stop_tokens(path)
    differ = student is not None and teacher is not None and student.keys() != teacher.keys()
    if dist.get_rank() != 0:
        return differ
    name = "objective.kd.stop_token=auto"
    if student is None or teacher is None:
        unknown = config.student.path if student is None else path or "the teacher on servers (without teacher.path)"
        logger.warning(
            "%s: the token that ends a response is distilled; %s has no tokenizer, so it is not known whether both models end "
            "responses with the same token: set it to keep if they do, otherwise to mask",
            *(name, unknown),
        )
    elif differ:
        logger.warning(
            "%s: the token that ends a response is left out of distillation; the student ends with %s, the teacher with %s "
            "(keep would teach it as well)",
            *(name, named_tokens(student), named_tokens(teacher)),
        )
    else:
        logger.info("%s: the token that ends a response is distilled; both models end with %s", name, named_tokens(student))
    return differ


def build_reference(config: Config, student: Student, vocab_size: int, on_phase: OnPhase) -> Teacher | FrozenBase | None:
    """A frozen copy of the initial student, in the student's layout; if adapters are trained, the model below them, which is no
    copy. None if the loss has no reference KL. Collective over the world."""
    if not uses_reference(config.objective):
        return None
    if student.lora is not None:
        return FrozenBase(student)
    assert config.student.path is not None
    parallel = config.parallel
    settings = TeacherConfig(parallel=TeacherParallelConfig(parallel.tensor, parallel.pipeline, parallel.expert))
    on_parameter = partial(on_phase, "load reference")
    return _frozen(config.student.path, settings, config, vocab_size, on_parameter)


def _frozen(
    path: str,
    settings: TeacherConfig | NamedTeacherConfig,
    config: Config,
    vocab_size: int,
    on_parameter: Callable[[], None],
    name: str | None = None,
) -> Teacher:
    size, share = dist.get_world_size(), config.batch.share_prompts
    return Teacher(path, settings, config.model, size, vocab_size, on_parameter, share_prompts=share, name=name)

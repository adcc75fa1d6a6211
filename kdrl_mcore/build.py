"""Build a run from its configuration, one function per part. Cheap checks come before expensive ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config, NamedTeacherConfig, TeacherConfig, TeacherParallelConfig
from kdrl_mcore.config.derived import (
    TEACHER,
    compares_over_vocabulary,
    engines_share_gpus,
    evaluates,
    has_separate_teacher,
    is_served,
    is_supervised,
    known_models,
    knows_top_k,
    loaded_teachers,
    longest_response,
    num_given,
    num_updates,
    prompts_of_teachers,
    reads_own_prompt,
    reads_scores,
    replays,
    samples,
    separate_teachers,
    served_teachers,
    teacher_heads,
    teaches_itself,
    uses_given,
    uses_reference,
    uses_teacher,
)
from kdrl_mcore.data.limits import Limits, check_prompts, check_teacher_prompts, check_teacher_rollouts, limits_of
from kdrl_mcore.data.prompts import describe_prompt
from kdrl_mcore.data.sources import data_notes, load_domains, reward_kinds, training_sources
from kdrl_mcore.data.stream import Domain, PromptStream
from kdrl_mcore.data.taught import describe_taught
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.data.vocabulary import shared_vocabulary, stop_tokens, unshared_tokens
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.evaluation.evaluate import Evaluation, metric_names
from kdrl_mcore.job import Job
from kdrl_mcore.model.lora import TEACHER_ADAPTER
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.objective.joint import check_functions
from kdrl_mcore.objective.schedules import Coefficient
from kdrl_mcore.parallel.collect import gather_objects, on_first_rank
from kdrl_mcore.parallel.layout import teacher_layout
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.planning.host_memory import too_little_memory
from kdrl_mcore.planning.memory import GIB, plan_engine_share
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.engine import FlowingEngine, RolloutEngine, Sampling
from kdrl_mcore.rollout.given import GivenResponses, WithGivenResponses, read_given
from kdrl_mcore.rollout.group_filter import GroupFilter
from kdrl_mcore.rollout.megatron import MegatronEngine
from kdrl_mcore.rollout.partial import PartialSampling
from kdrl_mcore.rollout.replay import ReplayedRollouts
from kdrl_mcore.rollout.source import Ahead, RolloutSource, SampledRollouts
from kdrl_mcore.rollout.vllm.engine import VllmEngine
from kdrl_mcore.rollout.vllm.placement import start_replicas
from kdrl_mcore.run_directory.export import check_export
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

OnPhase = Callable[[str], None]
"""Called with the name of a phase when it begins and whenever it makes progress."""


def build_job(config: Config, on_phase: OnPhase = lambda phase: None, on_progress: Callable[[], None] = lambda: None) -> Job:
    """Build every part of the run. Collective over the world.

    Args:
        on_progress: called during training whenever engines or teachers in other processes make progress.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained, naming what to change.
    """
    check_outcome(config)
    data = build_training_data(config, on_phase)
    _warn_of_little_memory(config)
    student = Student(config, dist.get_world_size(), data.vocab_size, partial(on_phase, "load student"))
    evaluation = build_evaluation(config, data, student, on_phase)
    on_first_rank(lambda: describe_data(config, data, evaluation))
    teacher = build_teacher(config, student, data, on_phase, on_progress)
    reference = build_reference(config, student, data.vocab_size, on_phase)
    on_phase("start engines")
    verifier = build_verifier(config, data, student)
    engine = build_engine(config, data, student, verifier, partial(on_phase, "start engines"), on_progress)
    return Job(
        config=config,
        student=student,
        teacher=teacher,
        reference=reference,
        source=build_source(config, data, student, engine, verifier),
        engine=engine,
        evaluation=evaluation,
        alpha=Coefficient(config.objective.alpha),
        beta=Coefficient(config.objective.beta),
        mask_stop_token=masks_stop_token(config),
        unshared=data.unshared,
    )


def _warn_of_little_memory(config: Config) -> None:
    wrong = None if torch.cuda.is_available() else too_little_memory(config)  # raises on all ranks or on none
    if wrong is not None and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s; otherwise Linux may kill them", wrong)


def check_outcome(config: Config) -> None:
    """Check the end of the run before it begins: that there is something to do, that the learning rate reaches its peak (if
    not, a warning is logged), that evaluations have the metric of the best checkpoint, and that the student can be exported.

    Raises:
        ConfigError: there is nothing to do, no such metric, or the export would be refused after the last step.
    """
    models = known_models(config)
    check_functions(config.objective)
    for name, teacher in config.teachers.items():
        if ":" in teacher.share.kind:
            find_function(f"teachers.{name}.share.kind", teacher.share.kind, {})
    if config.trainer.steps == 0 and not evaluates(config):
        raise ConfigError(
            "trainer.steps=0 only evaluates, and there is nothing to evaluate on: set data.eval or eval.benchmarks, and leave "
            "eval.every at 0"
        )
    if 0 < num_updates(config) < config.optimizer.warmup_steps and dist.get_rank() == 0:
        logger.warning(
            "optimizer.warmup_steps=%d is more than the run's %d updates: the learning rate never reaches optimizer.lr=%g",
            *(config.optimizer.warmup_steps, num_updates(config), config.optimizer.lr),
        )
    best = config.checkpoint.best
    if best is not None and best not in (names := metric_names(config)):
        raise ConfigError(f"checkpoint.best={best} is not a metric of the evaluations; there are: {', '.join(names)}")
    if config.checkpoint.export_hf:
        check_export(Path(config.run.dir), list(models.values()), adapters=config.student.lora.rank > 0)


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        tokenizer: None only if rollouts are replayed and nothing is evaluated.
        vocab_size: the number of tokens that all models share.
        limits: the models' limits on token ids and lengths.
        domains: the prompts; empty if rollouts are replayed.
        unshared: see `Job`.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    limits: Limits
    domains: list[Domain]
    unshared: Mapping[str, frozenset[int]] = field(default_factory=dict)


def build_training_data(config: Config, on_phase: OnPhase) -> TrainingData:
    """Load the tokenizer and the prompts. Collective over the world.

    Raises:
        ConfigError, DataError, ModelError: they cannot be used, or exceed the models' limits.
    """
    on_phase("load tokenizers")
    assert config.student.path is not None
    teachers = [each.path for each in config.teachers.values()] or [config.teacher.path]
    tokenizer, vocab_size = shared_vocabulary(config.student.path, *teachers, added_may_differ=has_separate_teacher(config))
    unshared = find_unshared(config)
    limits = limits_of(config, vocab_size)
    if tokenizer is None and not replays(config):
        raise ConfigError(f"{config.student.path} has no tokenizer.json, which sampling needs")
    if tokenizer is None and evaluates(config):
        raise ConfigError(f"{config.student.path} has no tokenizer, which data.eval and eval.benchmarks need")
    domains = []
    if tokenizer is not None and not replays(config):
        sources = training_sources(config)
        on_phase("load prompts")
        domains = load_domains(config, tokenizer, partial(on_phase, "load prompts"))
        for (source, _), domain in zip(sources, domains, strict=True):
            check_prompts(domain.prompts, str(source.path), limits, longest_response(config))
            check_teacher_prompts(domain.prompts, str(source.path), config, unshared)
    return TrainingData(tokenizer, vocab_size, limits, domains, unshared)


def find_unshared(config: Config) -> dict[str, frozenset[int]]:
    """By teacher, the student's added tokens at whose ids it has others. Rank 0 says what follows from it.

    Raises:
        ConfigError: the loss compares both models over the vocabulary.
    """
    teachers = {name: each.path for name, each in separate_teachers(config).items() if each.path}
    return {name: frozenset(_unshared_by(config, path)) for name, path in teachers.items()}


def _unshared_by(config: Config, teacher: str) -> dict[int, str]:
    assert config.student.path is not None
    unshared = unshared_tokens(config.student.path, teacher)
    if unshared and compares_over_vocabulary(config.objective):
        first = min(unshared)
        raise ConfigError(
            f"the teacher {teacher} has other added tokens than the student ({len(unshared)}, the first at id "
            f"{first}, {unshared[first]!r}), and objective.kd.estimator={config.objective.kd.estimator} compares the whole "
            "vocabulary (as kd.control_variate does): set it to k1, k2 or k3"
        )
    if unshared and dist.get_rank() == 0:
        logger.warning(
            "the teacher %s has other added tokens at %d ids: a response is distilled up to the first of %s",
            *(teacher, len(unshared), _listed(unshared)),
        )
    return unshared


def build_evaluation(config: Config, data: TrainingData, student: Student, on_phase: OnPhase) -> Evaluation | None:
    """The benchmarks, checked against the student's limits; None if nothing is evaluated."""
    on_phase("load evaluation")
    if not evaluates(config):
        return None
    assert data.tokenizer is not None and config.student.path is not None
    limits = Limits.of(student.parts.architecture.vocab_size, [config.student.path])
    return Evaluation(config, data.tokenizer, student.groups, limits)


def describe_data(config: Config, data: TrainingData, evaluation: Evaluation | None) -> None:
    """Log a summary of the data, and one prompt as the models see it.

    Raises:
        DataError: one of several teachers teaches a value that no prompt has.
    """
    benchmarks = [] if evaluation is None else evaluation.benchmarks
    for line in data_notes(data.domains, benchmarks):
        logger.warning("%s", line)
    if data.domains:
        for line in describe_taught(config, [domain.prompts for domain in data.domains]):
            logger.info("%s", line)
    prompts = [*(domain.prompts for domain in data.domains), *(benchmark.prompts for benchmark in benchmarks)]
    if prompts and data.tokenizer is not None:
        logger.info("%s", describe_prompt(prompts[0][0], data.tokenizer))


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
            *(name, _listed(student), _listed(teacher)),
        )
    else:
        logger.info("%s: the token that ends a response is distilled; both models end with %s", name, _listed(student))
    return differ


def _listed(tokens: Mapping[int, str]) -> str:
    return " or ".join(f"{index} ({text!r})" for index, text in sorted(tokens.items()))


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


def build_verifier(config: Config, data: TrainingData, student: Student) -> Verifier | None:
    """The verifier on the ranks that verify sampled responses, None on the others. vLLM's responses arrive on rank 0, which
    verifies them while others are still being sampled; otherwise, and for responses in parts, the replicas' leaders share the
    work."""
    in_vllm = config.rollout.engine == "vllm" and config.rollout.partial_tokens is None
    verifies = dist.get_rank() == 0 if in_vllm else student.groups.is_replica_leader
    return Verifier(config.reward, reward_kinds(data.domains)) if verifies and samples(config) else None


def build_engine(
    config: Config,
    data: TrainingData,
    student: Student,
    verifier: Verifier | None,
    on_wait: Callable[[], None],
    on_progress: Callable[[], None],
) -> RolloutEngine | None:
    """The engine that samples for training or evaluation, or None if nothing is sampled. Collective over the world.

    Args:
        on_wait: called repeatedly while vLLM's servers start.
        on_progress: called whenever they make progress later.
    """
    if data.tokenizer is None:
        return None
    if config.rollout.engine != "vllm":
        return MegatronEngine(student.parts, data.tokenizer, config.rollout.max_sequences, lambda: student.version)
    if not samples(config) and not evaluates(config):
        return None
    replicas = start_replicas(config, data.vocab_size, _engine_share(config), on_wait)
    return VllmEngine(
        replicas,
        config.rollout,
        data.tokenizer,
        verifier,
        vocab_size=data.vocab_size,
        on_progress=on_progress,
        lora=config.student.lora if config.rollout.vllm.refit_adapters else None,
    )


def _engine_share(config: Config) -> float | None:
    """The share of a GPU's memory for a colocated engine; None where engines share no GPU. It is what the plan
    (docs/planning.md) leaves once the optimizer's state exists, which is allocated only at the first update. Rank 0 plans.
    Collective over the world.

    Raises:
        ConfigError: on all ranks: too little memory is left.
    """
    if not engines_share_gpus(config.rollout) or not torch.cuda.is_available():
        return None
    smallest = min(gather_objects(torch.cuda.get_device_properties(device()).total_memory)) / GIB
    share = on_first_rank(lambda: plan_engine_share(config, dist.get_world_size(), smallest))
    if dist.get_rank() == 0:
        logger.info("colocated engines take %.0f %% of each GPU", 100 * share)
    return share


def build_source(
    config: Config, data: TrainingData, student: Student, engine: RolloutEngine | None, verifier: Verifier | None
) -> RolloutSource:
    """Where the rollouts of each step come from."""
    rollout, seed, shuffle = config.rollout, config.trainer.seed, config.data.shuffle
    if is_supervised(config.objective):
        return GivenResponses(PromptStream.of(data.domains, rollout.prompts_per_step, seed, shuffle), student)
    source: RolloutSource
    if replays(config):
        assert rollout.path is not None
        source = ReplayedRollouts(rollout.path, data.limits, config.batch.updates_per_step)
        check_teacher_rollouts(source.every, rollout.path, config, data.unshared)
    else:
        assert engine is not None
        prompts = PromptStream.of(data.domains, rollout.prompts_per_step, seed, shuffle)
        source = build_sampling_source(config, student, engine, prompts, verifier)
    if not uses_given(config):
        return source
    domains = data.domains
    if rollout.given.path is not None:
        responses, cut_off = read_given(rollout.given.path, data.limits, rollout.max_response_tokens)
        domains = [Domain("", responses)]
        if cut_off and dist.get_rank() == 0:
            logger.warning("%s: %d responses were cut off and are left out", rollout.given.path, cut_off)
    given = PromptStream.of(domains, 1, seed + 1, shuffle)  # an order different from that of the prompts to sample
    return WithGivenResponses(source, given, student, partial(num_given, config))


def build_sampling_source(
    config: Config, student: Student, engine: RolloutEngine, prompts: PromptStream, verifier: Verifier | None
) -> SampledRollouts:
    """Responses to the prompts, sampled with the student's present weights or steps ahead."""
    rollout = config.rollout
    sampling = Sampling(
        rollout.temperature,
        rollout.top_p,
        rollout.max_response_tokens,
        rollout.responses_per_prompt,
        (config.trainer.seed, 0),
        verify=True,
        part_tokens=_part_tokens(config) if config.teacher.score_while_sampling else 0,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=tuple(rollout.stop),
        experts=rollout.replay_experts,
    )
    settings = rollout.group_filter
    wanted = GroupFilter(rollout.prompts_per_step, settings.rounds, settings.others == "teach") if settings.rounds else None
    ahead = None
    if rollout.steps_ahead:
        how: FlowingEngine | PartialSampling
        if rollout.partial_tokens is not None:
            how = PartialSampling(rollout.partial_tokens, rollout.max_continuations)
        else:
            assert isinstance(engine, VllmEngine)
            how = engine
        ahead = Ahead(
            how,
            steps=rollout.steps_ahead,
            max_age=rollout.max_age or rollout.steps_ahead,
            waits=rollout.partial_tokens is None and rollout.unfinished == "wait",
            last_step=config.trainer.steps,
            updates_per_step=config.batch.updates_per_step,
        )
    return SampledRollouts(engine, student, prompts, verifier, sampling, wanted, ahead)


def _part_tokens(config: Config) -> int:
    """How many tokens the teacher scores at a time while others are sampled: a full micro-batch for every stage of every
    replica, or as many full requests as are in flight at a time. 0 without a teacher."""
    if not uses_teacher(config.objective):
        return 0
    world, micro_tokens = dist.get_world_size(), config.batch.micro_tokens
    layouts = [teacher_layout(world, each.parallel) for each in loaded_teachers(config).values()]
    parts = [micro_tokens * layout.context * layout.pipeline * layout.data for layout in layouts]
    served = [each.server for each in served_teachers(config).values()]
    return max(parts + [each.batch_tokens * each.concurrency * (len(each.urls) or each.replicas) for each in served])

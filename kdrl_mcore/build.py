"""Build a run from its configuration, one function per part. Cheap checks come before expensive ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from kdrl_mcore.build_data import OnPhase, TrainingData, build_evaluation, build_training_data, describe_data
from kdrl_mcore.build_teachers import build_reference, build_teacher, masks_stop_token
from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import (
    engines_share_gpus,
    evaluates,
    is_supervised,
    known_models,
    loaded_teachers,
    num_given,
    num_updates,
    replays,
    samples,
    served_teachers,
    uses_given,
    uses_teacher,
)
from kdrl_mcore.data.limits import check_teacher_rollouts
from kdrl_mcore.data.sources import reward_kinds
from kdrl_mcore.data.stream import Domain, PromptStream
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.evaluation.evaluate import metric_names
from kdrl_mcore.job import Job
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
from kdrl_mcore.student.student import Student

logger = logging.getLogger(__name__)


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

"""The best layouts for a number of GPUs: every combination that exists is planned, and the fastest that fit are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from kdrl_mcore.config import Config, ParallelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.parallel.layout import Layout
from kdrl_mcore.planning.memory import GIB, engine_share, fit_engine
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import find_engines, make_setup, shard_requests, training_world, uses_teacher
from kdrl_mcore.planning.shards import ShardRequest, find_shape, try_shards
from kdrl_mcore.planning.workload import Workload

SIZES = (1, 2, 4, 8, 16)
VIRTUAL = (None, 2, 4)
LONG = 8192
"""Tokens of a sequence from which on context parallelism is worth a look."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    overrides: tuple[str, ...]
    plan: Plan
    reason: str


def search(config: Config, workload: Workload, best: int = 5) -> tuple[list[Candidate], int]:
    """The fastest layouts that fit, and how many were looked at.

    Tensor parallelism stays within a node. Colocated engines take what training leaves, at most what the configuration says.
    Layouts that differ in nothing but recompute or micro-batch size count as one: the faster one is shown.
    """
    teachers = _teacher_variants(config) if uses_teacher(config) else []
    # All in one faked world; each plan below finds its shards there.
    try_shards([request for variant in [*teachers, *_variants(config)] for request in _requests(variant)])
    if teachers:
        config = _with_fastest_teacher(config, teachers, workload)
    found: dict[Layout, Plan] = {}
    looked_at = 0
    for variant in _variants(config):
        try:
            plan = make_plan(fit_engine(make_setup(variant, workload)))
        except ConfigError:
            continue  # the model cannot be split this way
        looked_at += 1
        layout = plan.setup.student.layout
        if plan.fits and (layout not in found or plan.seconds < found[layout].seconds):
            found[layout] = plan
    ranked = sorted(found.values(), key=lambda plan: plan.seconds)[:best]
    return [Candidate(tuple(_overrides(plan)), plan, _reason(plan, ranked[0])) for plan in ranked], looked_at


def _teacher_variants(config: Config) -> list[Config]:
    variants = []
    for tensor, pipeline in product(_tensors(config), (1, 2, 4)):
        variant = copy.deepcopy(config)
        variant.parallel = ParallelConfig()
        variant.teacher.parallel.tensor, variant.teacher.parallel.pipeline = tensor, pipeline
        variants.append(variant)
    return variants


def _with_fastest_teacher(config: Config, variants: list[Config], workload: Workload) -> Config:
    """The teacher's layout depends on nothing else: of those that leave half of the GPU to others, the fastest."""
    fastest, seconds = config, math.inf
    for variant in variants:
        try:
            setup = make_setup(variant, workload)
        except ConfigError:
            continue
        assert setup.teacher is not None
        held = max(stage.parameters for stage in setup.teacher.shard.stages) * setup.teacher.element
        taken = make_plan(setup).phase("teacher").total
        if held <= config.cluster.memory_gib * GIB / 2 and taken < seconds:
            fastest, seconds = copy.deepcopy(config), taken
            fastest.teacher.parallel = variant.teacher.parallel
    return fastest


def _tensors(config: Config) -> list[int]:
    return [size for size in SIZES if size <= config.cluster.gpus_per_node]


def _variants(config: Config) -> Iterator[Config]:
    world = training_world(config)
    architecture = read_architecture(find_shape(config.student.path, "student.path"))
    sequence = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    engines = [1] if find_engines(_with_engine(config, 1), world) is None else _tensors(config)
    experts = SIZES if architecture.experts else (1,)
    for tensor, pipeline, virtual, context, expert in product(_tensors(config), SIZES, VIRTUAL, (1, 2, 4), experts):
        if world % (tensor * pipeline * context) or (virtual and pipeline == 1) or (context > 1 and sequence < LONG):
            continue
        if architecture.num_layers % (pipeline * (virtual or 1)):
            continue
        for engine, recompute, pack in product(engines, ("none", "full"), (1, 2)):
            changed = _with_engine(config, engine)
            changed.parallel = replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                expert=expert,
                sequence_parallel=tensor > 1,
                recompute=recompute,
            )
            changed.batch.micro_tokens = pack * -(-sequence // context)
            yield changed


def _with_engine(config: Config, tensor: int) -> Config:
    changed = copy.deepcopy(config)
    changed.rollout.vllm.tensor = tensor
    return changed


def _overrides(plan: Plan) -> Iterator[str]:
    config, parallel = plan.setup.config, plan.setup.config.parallel
    for key in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
        if getattr(parallel, key) not in (None, 1):
            yield f"parallel.{key}={getattr(parallel, key)}"
    yield f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}"
    yield f"parallel.recompute={parallel.recompute}"
    yield f"batch.micro_tokens={config.batch.micro_tokens}"
    if plan.setup.teacher is not None:
        yield f"teacher.parallel.tensor={config.teacher.parallel.tensor}"
        yield f"teacher.parallel.pipeline={config.teacher.parallel.pipeline}"
    if plan.setup.engine is not None:
        yield f"rollout.vllm.tensor={config.rollout.vllm.tensor}"
        yield f"rollout.vllm.gpu_memory_utilization={engine_share(plan.setup):g}"


def _requests(config: Config) -> list[ShardRequest]:
    try:
        return list(shard_requests(config, training_world(config)).values())
    except ConfigError:
        return []


def _reason(plan: Plan, best: Plan) -> str:
    """What sets a layout apart from the best one."""
    longest = max(plan.phases, key=lambda phase: phase.seconds.total)
    text = f"{longest.name} {longest.seconds.total:.0f} s, ruled by {longest.seconds.bound}"
    fullest = max(plan.memory, key=lambda rank: rank.peak)
    text += f"; {(fullest.capacity or 0) / GIB - fullest.peak / GIB:.0f} GiB free in {fullest.fullest}"
    if plan is best:
        return text
    slower = max(plan.phases, key=lambda phase: phase.seconds.total - best.phase(phase.name).total)
    return f"{slower.name} {slower.seconds.total - best.phase(slower.name).total:+.1f} s; {text}"

"""The best layouts for a number of GPUs: every valid combination is planned, and the fastest that fit are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from kdrl_mcore.config import Config, ParallelConfig
from kdrl_mcore.config.derived import loaded_teachers, max_sequence_tokens, training_ranks
from kdrl_mcore.config.schema import DEFAULT_RECOMPUTE
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.parallel.layout import Layout
from kdrl_mcore.planning.memory import ATTENTION, GIB, engine_share, fit_engine
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import find_engines, make_setup, shard_requests
from kdrl_mcore.planning.shards import ShardRequest, find_shape, try_shards
from kdrl_mcore.planning.workload import Workload

SIZES = (1, 2, 4, 8, 16)
VIRTUAL = (None, 2, 4)
LONG = 8192
"""The number of tokens in a sequence from which context parallelism is tried."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: its overrides, its plan, and what sets it apart from the best one."""

    overrides: tuple[str, ...]
    plan: Plan
    reason: str


def search(config: Config, workload: Workload, best: int = 5) -> tuple[list[Candidate], int]:
    """The fastest layouts that fit, and the number of layouts that were planned.

    Tensor parallelism stays within a node. Colocated engines take what training leaves, at most what the configuration sets.
    Layouts that differ only in recompute, off-load or micro-batch size count as one: the fastest is shown.
    """
    teachers = _teacher_variants(config) if loaded_teachers(config) and not config.teachers else []
    # All are built in one fake world, where each plan below finds its shards.
    try_shards([request for variant in [*teachers, *_variants(config)] for request in _requests(variant)])
    if teachers:
        config = _with_fastest_teacher(config, teachers, workload)
    found: dict[Layout, Plan] = {}
    planned, too_large = 0, []
    for variant in _variants(config):
        plan = _planned(variant, workload)
        if plan is not None:
            planned += 1
            if plan.fits:
                _keep_faster(found, plan)
            else:
                too_large.append((plan, variant))
    # Keeping fewer activations never takes less time, so only layouts that could be among the best are planned again.
    too_large = [(plan, variant) for plan, variant in too_large if _may_be_among(found, plan, best)]
    smaller = [list(_with_less_memory(variant)) for _, variant in too_large]
    try_shards([request for variants in smaller for variant in variants for request in _requests(variant)])
    for (plan, _), variants in sorted(zip(too_large, smaller, strict=True), key=lambda each: each[0][0].seconds):
        for variant in variants if _may_be_among(found, plan, best) else ():
            kept = _planned(variant, workload)
            planned += kept is not None
            if kept is not None and kept.fits:
                _keep_faster(found, kept)
    ranked = sorted(found.values(), key=lambda plan: plan.seconds)[:best]
    return [Candidate(tuple(_overrides(plan)), plan, _reason(plan, ranked[0])) for plan in ranked], planned


def _planned(variant: Config, workload: Workload) -> Plan | None:
    try:
        return make_plan(fit_engine(make_setup(variant, workload)))
    except ConfigError:
        return None  # the model cannot be split this way


def _keep_faster(found: dict[Layout, Plan], plan: Plan) -> None:
    layout = plan.setup.student.layout
    if layout not in found or plan.seconds < found[layout].seconds:
        found[layout] = plan


def _may_be_among(found: dict[Layout, Plan], plan: Plan, best: int) -> bool:
    """Whether a plan of the same layout that takes at least this time may be one of the best."""
    same = found.get(plan.setup.student.layout)
    others = sorted(each.seconds for each in found.values())[:best]
    return (same is None or plan.seconds < same.seconds) and (len(others) < best or plan.seconds < others[-1])


def _teacher_variants(config: Config) -> list[Config]:
    variants = []
    for tensor, pipeline in product(_tensors(config), (1, 2, 4)):
        variant = copy.deepcopy(config)
        variant.parallel = ParallelConfig()
        variant.teacher.parallel.tensor, variant.teacher.parallel.pipeline = tensor, pipeline
        variants.append(variant)
    return variants


def _with_fastest_teacher(config: Config, variants: list[Config], workload: Workload) -> Config:
    """The configuration with the fastest of the teacher's layouts whose weights take at most half of a GPU. The choice does not
    depend on the student's layout."""
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
    world_size = training_ranks(config.cluster)
    architecture = read_architecture(find_shape(config.student.path, "student.path"))
    sequence = max_sequence_tokens(config.rollout)
    engines = [1] if find_engines(_with_engine(config, 1), world_size) is None else _tensors(config)
    experts = SIZES if architecture.experts else (1,)
    for tensor, pipeline, virtual, context, expert in product(_tensors(config), SIZES, VIRTUAL, (1, 2, 4), experts):
        if world_size % (tensor * pipeline * context) or (virtual and pipeline == 1) or (context > 1 and sequence < LONG):
            continue
        if architecture.num_layers % (pipeline * (virtual or 1)):
            continue
        for engine, pack in product(engines, (1, 2)):
            changed = _with_engine(config, engine)
            changed.parallel = replace(
                config.parallel,
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                expert=expert,
                sequence_parallel=tensor > 1,
                recompute="none",
                recompute_modules=list(DEFAULT_RECOMPUTE),
                offload_activations=[],
            )
            changed.batch.micro_tokens = pack * -(-sequence // context)
            yield changed


def _with_less_memory(config: Config) -> Iterator[Config]:
    """The same layout, keeping fewer activations on the GPU: some off-loaded, some recomputed, both, all recomputed."""
    for recompute, offloaded in (("none", ATTENTION), ("selective", ()), ("selective", ATTENTION), ("full", ())):
        changed = copy.copy(config)
        changed.parallel = replace(config.parallel, recompute=recompute, offload_activations=list(offloaded))
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
    if parallel.offload_activations:
        yield f"parallel.offload_activations=[{','.join(parallel.offload_activations)}]"
    yield f"batch.micro_tokens={config.batch.micro_tokens}"
    if loaded_teachers(config) and not config.teachers:
        yield f"teacher.parallel.tensor={config.teacher.parallel.tensor}"
        yield f"teacher.parallel.pipeline={config.teacher.parallel.pipeline}"
    if plan.setup.engine is not None:
        yield f"rollout.vllm.tensor={config.rollout.vllm.tensor}"
        yield f"rollout.vllm.gpu_memory_utilization={engine_share(plan.setup):g}"


def _requests(config: Config) -> list[ShardRequest]:
    try:
        return list(shard_requests(config, training_ranks(config.cluster)).values())
    except ConfigError:
        return []


def _reason(plan: Plan, best: Plan) -> str:
    """What sets a layout apart from the best one."""
    longest = max(plan.phases, key=lambda phase: phase.seconds.total)
    text = f"{longest.name} {longest.seconds.total:.0f} s, bound by {longest.seconds.bound}"
    fullest = max(plan.memory, key=lambda rank: rank.peak)
    text += f"; {(fullest.capacity or 0) / GIB - fullest.peak / GIB:.0f} GiB free in {fullest.fullest}"
    if plan is best:
        return text
    slower = max(plan.phases, key=lambda phase: phase.seconds.total - best.phase(phase.name).total)
    return f"{slower.name} {slower.seconds.total - best.phase(slower.name).total:+.1f} s; {text}"

"""Advice on a plan: which changes would make it fit, and what limits its longest phase."""

from __future__ import annotations

import copy
from collections.abc import Callable

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import asks_for_transformer_engine
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.planning.memory import ATTENTION, GIB, engine_share, fitting_share, leaves_attention
from kdrl_mcore.planning.plan import Plan
from kdrl_mcore.planning.savings import with_config
from kdrl_mcore.planning.setup import Setup, shard_requests
from kdrl_mcore.planning.shards import ShardRequest, try_shards


def advise(plan: Plan) -> list[str]:
    """Lines of advice: what limits the longest phase, whether Transformer Engine decides if the run is refused, what does not
    fit, and which single changes would make it fit."""
    longest = max(plan.phases, key=lambda phase: phase.seconds.total)
    lines = [f"The longest phase is {longest.name}, bound by {longest.seconds.bound}.", *_refused_by_layers(plan.setup)]
    if plan.fits:
        return lines
    worst = max(plan.memory, key=lambda rank: rank.peak - (rank.capacity or 0))
    assert worst.capacity is not None
    largest = max(
        (item for item in worst.items if not item.phases or worst.fullest in item.phases), key=lambda item: item.bytes
    )
    lines.append(
        f"DOES NOT FIT: {worst.name} needs {worst.peak / GIB:.1f} GiB in {worst.fullest}, but {worst.capacity / GIB:.1f} "
        f"are available; the largest part is {largest.kind} ({largest.bytes / GIB:.1f} GiB)."
    )
    fits = [(name, other) for name, other in _changes(plan) if other.fits]
    lines += [f"It would fit with {name}: {other.peak / GIB:.1f} GiB, {other.seconds:.1f} s." for name, other in fits]
    if not fits:
        lines.append("No single change makes it fit: kdrl-plan --search tries combinations.")
    return lines


def _refused_by_layers(setup: Setup) -> list[str]:
    """Why the run would be refused with Transformer Engine, or without it, if the plan cannot know whether it can be used."""
    lines = []
    if asks_for_transformer_engine(setup.config.model) is None:
        for installed in (True, False):
            try:
                Activations.of(setup.config.parallel).check(setup.student.architecture, transformer_engine=installed)
            except ConfigError as error:
                where = "can be used" if installed else "cannot be used"
                lines.append(f"Where Transformer Engine {where}, the run is refused: {error}.")
    return lines


def _changes(plan: Plan) -> list[tuple[str, Plan]]:
    config, setup = plan.setup.config, plan.setup
    candidates: list[tuple[str, Callable[[Config], None]]] = []

    def add(name: str, section: str, key: str, value: object) -> None:
        def change(c: Config) -> None:
            setattr(getattr(c, section), key, value)
            if section == "parallel" and key == "tensor":
                c.parallel.sequence_parallel = c.parallel.tensor > 1

        candidates.append((name, change))

    def add_engine(key: str, value: float) -> None:
        candidates.append((f"rollout.vllm.{key}={value:g}", lambda c: setattr(c.rollout.vllm, key, value)))

    parallel = config.parallel
    if parallel.recompute != "full":
        if not parallel.offload_activations and (parallel.recompute == "none" or leaves_attention(parallel)):
            value = list(ATTENTION)
            add(f"parallel.offload_activations=[{','.join(value)}]", "parallel", "offload_activations", value)
        if parallel.recompute == "none" and not set(parallel.offload_activations) & set(parallel.recompute_modules):
            add("parallel.recompute=selective", "parallel", "recompute", "selective")
        if not parallel.offload_activations:
            add("parallel.recompute=full", "parallel", "recompute", "full")
    if not config.optimizer.offload:
        add("optimizer.offload=true", "optimizer", "offload", True)
    if setup.teacher is not None and not config.teachers and not config.teacher.offload:
        add("teacher.offload=true", "teacher", "offload", True)
    if setup.update_packing.largest < config.batch.micro_tokens or config.batch.micro_tokens > setup.workload.longest:
        smaller = max(setup.workload.longest + config.rollout.max_prompt_tokens, config.batch.micro_tokens // 2)
        if smaller < config.batch.micro_tokens:
            add(f"batch.micro_tokens={smaller}", "batch", "micro_tokens", smaller)
    if setup.engine is not None:
        add_engine("tensor", 2 * config.rollout.vllm.tensor)
        if fitting_share(setup) < engine_share(setup):
            add_engine("gpu_memory_utilization", fitting_share(setup))
    elif config.rollout.max_sequences > config.rollout.responses_per_prompt:
        half = config.rollout.max_sequences // 2
        add(f"rollout.max_sequences={half}", "rollout", "max_sequences", half)
    for key in ("tensor", "pipeline", "context"):
        double = 2 * getattr(config.parallel, key)
        add(f"parallel.{key}={double}", "parallel", key, double)
    _build_at_once(plan, [change for _, change in candidates])
    result = []
    for name, change in candidates:
        try:
            result.append((name, with_config(plan, change)))
        except ConfigError:
            continue  # that layout does not exist
    return result


def _build_at_once(plan: Plan, changes: list[Callable[[Config], None]]) -> None:
    """Build the shards of all changes in one fake world; each plan then finds its own."""
    requests: list[ShardRequest] = []
    for change in changes:
        config = copy.deepcopy(plan.setup.config)
        change(config)
        try:
            requests += shard_requests(config, plan.setup.student.layout.world_size).values()
        except ConfigError:
            continue
    try_shards(requests)

"""What each measure that makes big runs cheap saves in a plan, whether it is on or off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kdrl_mcore.config import Config
from kdrl_mcore.planning.plan import Plan, make_plan, old_policy_seconds
from kdrl_mcore.planning.setup import make_setup

NEEDS_SERVERS = "needs vLLM servers"


@dataclass(frozen=True)
class Measure:
    """One measure in one run.

    Attributes:
        key: what switches it; empty where the trainer always, or never, does it.
        seconds, bytes: what it saves of an iteration and of the peak: without it minus with it, all else as planned. None where
            it cannot be had.
        note: why it cannot be had, or what the figures are.
    """

    name: str
    key: str
    on: bool
    seconds: float | None
    bytes: float | None
    note: str = ""


def with_config(plan: Plan, change: Callable[[Config], None]) -> Plan:
    """The plan of the same run with its configuration changed.

    Raises:
        ConfigError: it then does not fit the number of GPUs.
    """
    config = copy.deepcopy(plan.setup.config)
    change(config)
    world = plan.setup.student.layout.world
    return make_plan(make_setup(config, plan.setup.workload, plan.setup.choices, world=world))


def measures(plan: Plan) -> list[Measure]:
    """Every measure, in the order of docs/planning.md; those of the teacher where there is one."""
    config = plan.setup.config
    return [
        _packing(plan),
        _micro_batches(plan),
        _switch(plan, "recompute", "parallel.recompute", config.parallel.recompute == "full", ("full", "none")),
        _switch(plan, "overlapped gradient reduction", "parallel.overlap_grad_reduce", config.parallel.overlap_grad_reduce),
        _switch(plan, "overlapped parameter gathering", "parallel.overlap_param_gather", config.parallel.overlap_param_gather),
        _switch(plan, "optimizer off-load", "optimizer.offload", config.optimizer.offload),
        *_of_teacher(plan),
        *_of_sampling(plan),
    ]


def _switch(plan: Plan, name: str, key: str, on: bool, values: tuple[object, object] = (True, False)) -> Measure:
    """A measure that a key switches; `values` are the key's with it and without it."""
    section, field = key.rsplit(".", 1)

    def change(config: Config) -> None:
        target: object = config
        for part in section.split("."):
            target = getattr(target, part)
        setattr(target, field, values[on])

    other = with_config(plan, change)
    sign = 1 if on else -1
    return Measure(name, key, on, sign * (other.seconds - plan.seconds) + 0.0, sign * (other.peak - plan.peak) + 0.0)


def _packing(plan: Plan) -> Measure:
    """Against every sequence padded to the longest, and as many of them for each rank."""
    workload = plan.setup.workload
    other = make_plan(replace(plan.setup, workload=replace(workload, response_tokens=workload.longest)))
    phases = ("teacher", "old policy", "reference", "training")
    seconds = sum(other.phase(name).total - plan.phase(name).total for name in phases)
    return Measure("token-balanced packing", "", True, seconds, 0.0)


def _micro_batches(plan: Plan) -> Measure:
    """Against all sequences of a rank in one micro-batch."""
    packed, context = plan.setup.scoring_packing, plan.setup.student.layout.context
    other = with_config(plan, lambda config: setattr(config.batch, "micro_tokens", packed.tokens * context))
    key = "batch.micro_tokens"
    return Measure("micro-batching by memory", key, True, other.seconds - plan.seconds, other.peak - plan.peak)


def _of_teacher(plan: Plan) -> Iterator[Measure]:
    setup, config = plan.setup, plan.setup.config
    if setup.teacher is None:
        return
    mask = config.objective.kd.mask
    yield _switch(plan, "teacher off-load", "teacher.offload", config.teacher.offload)
    name, key = "teacher while servers sample", "teacher.score_while_sampling"
    if setup.engine_gpus and not config.rollout.steps_ahead:
        yield _switch(plan, name, key, config.teacher.score_while_sampling)
    else:
        yield Measure(name, key, False, None, None, f"{NEEDS_SERVERS}, and no step ahead")
    with_mask = "response" if mask == "none" else mask
    yield _switch(plan, "teacher pruned by mask", "objective.kd.mask", mask != "none", (with_mask, "none"))


def _of_sampling(plan: Plan) -> Iterator[Measure]:
    setup, config = plan.setup, plan.setup.config
    if config.objective.kind == "sft":
        return
    updates, seconds = config.batch.updates_per_step, old_policy_seconds(setup)
    yield Measure("no old-policy pass on-policy", "batch.updates_per_step", updates == 1, seconds, 0.0)
    name, key = "one-step-off generation", "rollout.steps_ahead"
    if setup.engine_gpus:
        yield _switch(plan, name, key, config.rollout.steps_ahead > 0, (1, 0))
    else:
        yield Measure(name, key, False, None, None, NEEDS_SERVERS)

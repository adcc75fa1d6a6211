"""The saving in a plan from each measure that makes big runs cheaper, whether it is on or off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import is_supervised, teaches_itself
from kdrl_mcore.planning.memory import ATTENTION, leaves_attention
from kdrl_mcore.planning.plan import Plan, make_plan, old_policy_seconds
from kdrl_mcore.planning.setup import make_setup

NEEDS_SERVERS = "needs vLLM servers"


@dataclass(frozen=True)
class Saving:
    """One measure in one run.

    Attributes:
        key: the key that switches it; empty if it is always on or always off.
        seconds, bytes: how much time of an iteration, and how much of the peak, it saves with everything else as planned; None
            if it is not available.
        note: why it is not available, or an explanation of the figures.
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
        ConfigError: the changed configuration does not fit the number of GPUs.
    """
    config = copy.deepcopy(plan.setup.config)
    change(config)
    world_size = plan.setup.student.layout.world_size
    return make_plan(make_setup(config, plan.setup.workload, plan.setup.choices, world_size=world_size))


def savings(plan: Plan) -> list[Saving]:
    """Every measure, in the order of docs/planning.md; those of the teacher only if there is one."""
    config = plan.setup.config
    return [
        _packing(plan),
        _micro_batches(plan),
        _recompute(plan),
        _activation_offload(plan),
        _switch(plan, "overlapped gradient reduction", "parallel.overlap_grad_reduce", config.parallel.overlap_grad_reduce),
        _switch(plan, "overlapped parameter gathering", "parallel.overlap_param_gather", config.parallel.overlap_param_gather),
        _switch(plan, "optimizer off-load", "optimizer.offload", config.optimizer.offload),
        *_of_teacher(plan),
        *_of_sampling(plan),
    ]


def _recompute(plan: Plan) -> Saving:
    """Compared with keeping every activation that is not off-loaded; if it is off, selective recompute is compared."""
    recompute = plan.setup.config.parallel.recompute
    values = ("selective" if recompute == "none" else recompute, "none")
    return _switch(plan, "recompute", "parallel.recompute", recompute != "none", values)


def _activation_offload(plan: Plan) -> Saving:
    """Compared with keeping activations on the GPU; if it is off, the saving is that of off-loading attention."""
    parallel = plan.setup.config.parallel
    name, key, on = "activation off-load", "parallel.offload_activations", bool(parallel.offload_activations)
    if parallel.recompute == "full" or (not on and parallel.recompute == "selective" and not leaves_attention(parallel)):
        return Saving(name, key, False, None, None, "recomputed instead")
    return _switch(plan, name, key, on, (parallel.offload_activations or list(ATTENTION), []))


def _switch(plan: Plan, name: str, key: str, on: bool, values: tuple[object, object] = (True, False)) -> Saving:
    """A measure that a key switches; `values` are the key's values with and without the measure."""
    section, field = key.rsplit(".", 1)

    def change(config: Config) -> None:
        target: object = config
        for part in section.split("."):
            target = getattr(target, part)
        setattr(target, field, values[on])

    other = with_config(plan, change)
    sign = 1 if on else -1
    return Saving(name, key, on, sign * (other.seconds - plan.seconds) + 0.0, sign * (other.peak - plan.peak) + 0.0)


def _packing(plan: Plan) -> Saving:
    """Compared with padding every sequence to the longest and giving each rank the same number of them."""
    workload = plan.setup.workload
    other = make_plan(replace(plan.setup, workload=replace(workload, response_tokens=workload.longest)))
    phases = ("teacher", "old policy", "scores", "reference", "training")
    seconds = sum(other.phase(name).total - plan.phase(name).total for name in phases)
    return Saving("token-balanced packing", "", True, seconds, 0.0)


def _micro_batches(plan: Plan) -> Saving:
    """Compared with all sequences of a rank in one micro-batch."""
    packed, context = plan.setup.scoring_packing, plan.setup.student.layout.context
    other = with_config(plan, lambda config: setattr(config.batch, "micro_tokens", packed.tokens * context))
    key = "batch.micro_tokens"
    return Saving("micro-batching by memory", key, True, other.seconds - plan.seconds, other.peak - plan.peak)


def _of_teacher(plan: Plan) -> Iterator[Saving]:
    setup, config = plan.setup, plan.setup.config
    if setup.teacher is None:
        return
    mask = config.objective.kd.mask
    if not config.teachers:
        yield _switch(plan, "teacher off-load", "teacher.offload", config.teacher.offload)
    name, key = "teacher while servers sample", "teacher.score_while_sampling"
    if setup.engine_gpus and not teaches_itself(config) and not config.rollout.steps_ahead:
        yield _switch(plan, name, key, config.teacher.score_while_sampling)
    else:
        yield Saving(name, key, False, None, None, f"{NEEDS_SERVERS}, rollout.steps_ahead=0 and teacher.path")
    with_mask = "response" if mask == "none" else mask
    yield _switch(plan, "teacher pruned by mask", "objective.kd.mask", mask != "none", (with_mask, "none"))


def _of_sampling(plan: Plan) -> Iterator[Saving]:
    setup, config = plan.setup, plan.setup.config
    if is_supervised(config.objective):
        return
    yield _switch(plan, "prompts computed once", "batch.share_prompts", config.batch.share_prompts)
    updates, seconds = config.batch.updates_per_step, old_policy_seconds(setup)
    yield Saving("no old-policy pass on-policy", "batch.updates_per_step", updates == 1, seconds, 0.0)
    name, key = "one-step-off generation", "rollout.steps_ahead"
    if setup.engine_gpus:
        yield _switch(plan, name, key, config.rollout.steps_ahead > 0, (1, 0))
    else:
        yield Saving(name, key, False, None, None, NEEDS_SERVERS)

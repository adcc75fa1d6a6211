"""What a change would do to a plan: each measure that makes big runs cheap, and what would make a run fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

from kdrl_mcore.config import Config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning.memory import GIB
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import make_setup


@dataclass(frozen=True)
class Lever:
    """A measure, and the plan with it changed (switched on where it is off, and the reverse).

    Attributes:
        state: how it is now.
        seconds, bytes: of an iteration and of the peak, changed minus now.
    """

    name: str
    state: str
    seconds: float
    bytes: float


def with_config(plan: Plan, change: Callable[[Config], None]) -> Plan:
    """The plan of the same run with its configuration changed.

    Raises:
        ConfigError: it then does not fit the number of GPUs.
    """
    config = copy.deepcopy(plan.setup.config)
    change(config)
    world = plan.setup.student.layout.world
    return make_plan(make_setup(config, plan.setup.workload, plan.setup.choices, world=world))


def levers(plan: Plan) -> list[Lever]:
    """Every measure that applies to the run."""
    setup, config = plan.setup, plan.setup.config
    result = [_padding(plan)]

    def toggle(name: str, state: str, change: Callable[[Config], None]) -> None:
        other = with_config(plan, change)
        result.append(Lever(name, state, other.seconds - plan.seconds, other.peak - plan.peak))

    parallel, offload = config.parallel, config.optimizer.offload
    recompute = {"full": "none", "none": "full"}[parallel.recompute]
    toggle("recompute", parallel.recompute, lambda c: setattr(c.parallel, "recompute", recompute))
    overlap = parallel.overlap_grad_reduce
    toggle("overlap_grad_reduce", _on(overlap), lambda c: setattr(c.parallel, "overlap_grad_reduce", not overlap))
    toggle("optimizer.offload", _on(offload), lambda c: setattr(c.optimizer, "offload", not offload))
    if setup.teacher is not None:
        away = config.teacher.offload
        toggle("teacher.offload", _on(away), lambda c: setattr(c.teacher, "offload", not away))
        mask = config.objective.kd.mask
        other = "response" if mask == "none" else "none"
        toggle("teacher pruned by mask", mask, lambda c: setattr(c.objective.kd, "mask", other))
    if config.objective.kind != "sft":
        updates = config.batch.updates_per_step
        name = f"updates_per_step ({'an' if updates > 1 else 'no'} old-policy pass)"
        toggle(name, str(updates), lambda c: setattr(c.batch, "updates_per_step", 1 if updates > 1 else 2))
    if setup.choices.rollout_gpus:
        ahead = setup.choices.steps_ahead
        other_plan = make_plan(replace(setup, choices=replace(setup.choices, steps_ahead=0 if ahead else 1)))
        result.append(Lever("one-step-off generation", f"{ahead} ahead", other_plan.seconds - plan.seconds, 0.0))
    return result


def _on(switch: bool) -> str:
    return "on" if switch else "off"


def _padding(plan: Plan) -> Lever:
    """Every sequence padded to the longest, and dealt out by count: what packing balanced by tokens avoids."""
    workload = plan.setup.workload
    padded = replace(workload, response_tokens=workload.longest)
    other = make_plan(replace(plan.setup, workload=padded))
    dense = ("teacher", "old policy", "reference", "training")
    seconds = sum(other.phase(name).total - plan.phase(name).total for name in dense)
    return Lever("token-balanced packing", "on", seconds, 0.0)


def advise(plan: Plan) -> list[str]:
    """Lines for a person: what does not fit and which single change would make it fit; what rules the longest phase."""
    longest = max(plan.phases, key=lambda phase: phase.seconds.total)
    lines = [f"The longest phase is {longest.name}, ruled by {longest.seconds.bound}."]
    if plan.fits:
        return lines
    worst = max(plan.memory, key=lambda rank: rank.peak - (rank.capacity or 0))
    assert worst.capacity is not None
    largest = max(
        (item for item in worst.items if not item.phases or worst.fullest in item.phases), key=lambda item: item.bytes
    )
    lines.append(
        f"DOES NOT FIT: stage {worst.stage} needs {worst.peak / GIB:.1f} GiB in {worst.fullest}, {worst.capacity / GIB:.1f} "
        f"can be used; most of it is {largest.kind} ({largest.bytes / GIB:.1f} GiB)."
    )
    fits = [(name, other) for name, other in _changes(plan) if other.fits]
    lines += [f"It would fit with {name}: {other.peak / GIB:.1f} GiB, {other.seconds:.1f} s." for name, other in fits]
    if not fits:
        lines.append("No single change makes it fit: tools/plan.py --search looks at combinations.")
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

    if config.parallel.recompute == "none":
        add("parallel.recompute=full", "parallel", "recompute", "full")
    if not config.optimizer.offload:
        add("optimizer.offload=true", "optimizer", "offload", True)
    if setup.teacher is not None and not config.teacher.offload:
        add("teacher.offload=true", "teacher", "offload", True)
    if setup.update_packing.largest < config.batch.micro_tokens or config.batch.micro_tokens > setup.workload.longest:
        smaller = max(setup.workload.longest + config.rollout.max_prompt_tokens, config.batch.micro_tokens // 2)
        if smaller < config.batch.micro_tokens:
            add(f"batch.micro_tokens={smaller}", "batch", "micro_tokens", smaller)
    if config.rollout.max_sequences > config.rollout.responses_per_prompt:
        half = config.rollout.max_sequences // 2
        add(f"rollout.max_sequences={half}", "rollout", "max_sequences", half)
    for key in ("tensor", "pipeline", "context"):
        double = 2 * getattr(config.parallel, key)
        add(f"parallel.{key}={double}", "parallel", key, double)
    result = []
    for name, change in candidates:
        try:
            result.append((name, with_config(plan, change)))
        except ConfigError:
            continue  # that layout does not exist
    return result

"""Runs that train adapters, compared with `peft`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.reference import adapters, dense
from tests.reference.adapters import MODULES as MODULES
from tests.support.agreement import about, assert_gradients, assert_log_probs
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROBE, PROBE_LR, Outcome, metrics_of, objective_overrides, score_and_train_on_rank

RANK, ALPHA = 4, 6.0


@dataclass(frozen=True)
class Adapted:
    """A student with random adapters, a teacher (None: the student without its adapters), and rollouts."""

    student: Path
    adapter: Path
    teacher: Path | None
    rollouts: Path
    modules: Sequence[str] = MODULES
    parameters: Sequence[str] = ()
    teacher_adapter: Path | None = None
    """Adapters of the teacher, which then is the student's base if no other is given."""

    @property
    def overrides(self) -> list[str]:
        return [
            f"student.path={self.student}",
            f"student.lora.path={self.adapter}",
            f"student.lora.rank={RANK}",
            f"student.lora.alpha={ALPHA}",
            f"student.lora.target_modules=[{','.join(self.modules)}]",
            f"student.lora.target_parameters=[{','.join(self.parameters)}]",
            *self._teacher,
            "rollout=replay",
            f"rollout.path={self.rollouts}",
        ]

    @property
    def _teacher(self) -> list[str]:
        if self.teacher_adapter is None:
            return ["teacher.weights=base" if self.teacher is None else f"teacher.path={self.teacher}"]
        return [f"teacher.path={self.teacher_adapter}", *(["teacher.weights=adapters"] if self.teacher is None else [])]


def adapt(
    folder: Path,
    student: Path,
    teacher: Path | None,
    rollouts: Path,
    modules: Sequence[str] = MODULES,
    parameters: Sequence[str] = (),
) -> Adapted:
    """Write random adapters for a student into a folder."""
    adapters.make_adapter(student, folder, seed=7, rank=RANK, alpha=ALPHA, modules=modules, parameters=parameters)
    return Adapted(student, folder, teacher, rollouts, modules, parameters)


def check(
    adapted: Adapted,
    rows: Sequence[dense.Row],
    settings: dense.Settings,
    pool: RankPool,
    layout: str,
    run: Path,
    reference: Path | None = None,
) -> int:
    """In one update the loss, the log-probs of every token, the gradient of every factor and the gradient's norm are those of
    `peft`. Returns how many models a rank has loaded."""
    expected, gradients = adapters.kdrl_of_adapters(
        adapted.student,
        adapted.adapter,
        adapted.teacher or adapted.student,
        rows,
        settings,
        reference,
        adapted.teacher_adapter,
    )
    overrides = [f"run.dir={run}", *adapted.overrides, *objective_overrides(settings), *PROBE, *FAST, *layout.split()]
    outcomes = pool.run(score_and_count_models_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes[0].stderr
    for outcome in outcomes:
        assert_log_probs(outcome.found["student"], expected.log_probs)
    (metrics,) = metrics_of(run)
    assert metrics["loss"] == about(expected.loss)
    before, after = adapters.read_factors(adapted.adapter), adapters.read_factors(run / "adapter")
    assert before.keys() == after.keys()
    assert_gradients({name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}, gradients)
    assert metrics["grad_norm"] == about(float(torch.stack([each.norm() for each in gradients.values()]).norm()))
    return outcomes[0].found["models"]


def score_and_count_models_on_rank(overrides: Sequence[str]) -> Outcome:
    """`score_and_train_on_rank`; `found["models"]` is the number of models that this rank has built."""
    from unittest.mock import patch

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.student import student
    from kdrl_mcore.teacher import teacher

    built: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(build(*args, **kwargs))
        return built[-1]

    build = student.build_model
    with patch.object(student, "build_model", counted), patch.object(teacher, "build_model", counted):
        outcome = score_and_train_on_rank(overrides)
    outcome.found["models"] = len(built)
    return outcome


def all_reduces_on_rank(overrides: Sequence[str]) -> Any:
    """Run `train_on_rank`. `found` has the number of elements of each all-reduce over the tensor-parallel group during the
    update's passes and the reduction of gradients; the number of elements that the gradient buffers and the optimizer's state
    keep; and whether any frozen weight has a gradient."""
    from unittest.mock import patch

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import torch.distributed as dist

    from kdrl_mcore.student.student import Student
    from tests.support.training import train_on_rank

    found: dict[str, Any] = {"sizes": []}
    gradient, reduce = Student._gradient, dist.all_reduce

    def watched(student: Any, micro_batches: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            if group is student.groups.tensor:
                found["sizes"].append(tensor.numel())
            return reduce(tensor, *args, group=group, **kwargs)

        with patch.object(dist, "all_reduce", counted):
            result = gradient(student, micro_batches)
        buffers = [buffer for chunk in student.optimizer.ddp for buffer in chunk.buffers]
        found["buffers"] = sum(buffer.grad_data.numel() for buffer in buffers)
        parameters = [p for chunk in student.parts.chunks for p in chunk.parameters()]
        found["trained"] = sum(p.numel() for p in parameters if p.requires_grad)
        found["main_weights"] = sum(p.numel() for group in student.optimizer.megatron.param_groups for p in group["params"])
        found["frozen_gradients"] = sum(p.grad is not None for p in parameters if not p.requires_grad)
        return result

    with patch.object(Student, "_gradient", watched):
        outcome = train_on_rank(overrides)
    outcome.found = found
    return outcome

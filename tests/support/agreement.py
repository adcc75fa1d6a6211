"""The trainer compared with the dense reference: a run in some layout, and the comparison of everything that it computes.

Loss, log-probs of every token under student and teacher, and the gradient of every parameter, in float32, to 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import dense
from tests.reference.dense import Result, Settings
from tests.reference.tiny_models import read_hf_weights
from tests.support.ranks import RankPool
from tests.support.training import (
    FAST,
    PROBE,
    PROBE_LR,
    Outcome,
    metrics_of,
    objective_overrides,
    score_and_train_on_rank,
    train_on_rank,
)
from tests.support.zoo import TOKENS, Zoo

TOLERANCE = 1e-4
NOISE_FLOOR = 1e-3  # if a parameter has a smaller share of the gradient's norm, its error is measured against this share
JOINT = Settings(alpha=1.0, beta=0.3)
SETTINGS = replace(JOINT, vocab_size=TOKENS)


@dataclass(frozen=True)
class Case:
    """One run: `overrides` give its layout, `settings` its objective. `given` names the rollouts that are added to the replayed
    ones as given responses; they are a third of all responses."""

    ranks: int
    overrides: str = ""
    settings: Settings = JOINT
    student: str = "untied"
    teacher: str | None = "teacher"
    rollouts: str = "uneven"
    given: str | None = None


def check(
    case: Case, zoo: Zoo, pool: RankPool, run: Path, on_rank: Callable[[Sequence[str]], Outcome] = score_and_train_on_rank
) -> None:
    """Run the case on the pool and compare everything with the dense reference."""
    settings = replace(case.settings, vocab_size=zoo.vocab_size(case.student))
    expected = zoo.reference(case.student, case.teacher, case.rollouts, settings, case.given)
    overrides = [
        f"run.dir={run}",
        f"student.path={zoo.model(case.student)}",
        *([] if case.teacher is None else [f"teacher.path={zoo.model(case.teacher)}"]),
        "rollout=replay",
        f"rollout.path={zoo.rollouts(case.rollouts)}",
        *([] if case.given is None else beside_given(zoo, case.given)),
        *objective_overrides(settings),
        *PROBE,
        *FAST,
        *case.overrides.split(),
    ]
    outcomes = pool.run(on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * case.ranks, outcomes[0].stderr
    for outcome in outcomes:  # every rank holds all scores
        assert_log_probs(outcome.found["student"], expected.log_probs)
        assert_log_probs(outcome.found["entropy"], expected.entropies)
        assert_log_probs(outcome.found["teacher"], expected.teacher_log_probs)
    num_given = 0 if case.given is None else len(zoo.rows(case.given))
    assert_metrics(metrics_of(run)[0], expected, settings, num_given)
    before, after = read_hf_weights(zoo.model(case.student)), read_hf_weights(run / "hf")
    assert before.keys() == after.keys()
    found = {name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}
    assert_gradients(found, expected.gradients)


LR = 0.25
"""The learning rate of `check_two_updates`: large enough for the second update to clip."""


def check_two_updates(
    settings: Settings,
    layout: str,
    zoo: Zoo,
    pool: RankPool,
    run: Path,
    reference: str | None,
    given: str | None = None,
    lr: float = LR,
) -> tuple[dict[str, float], list[Result]]:
    """Compare two updates on one batch, the second of which is off-policy, with the dense reference: losses and the sum of the
    gradients.

    Args:
        layout: overrides of the layout.
        reference: the model of the KL to the initial student, if any.
        given: see `Case`; each update has half of them.
        lr: learning rate of plain gradient descent; the larger it is, the more digits of a small gradient the weights keep.

    Returns:
        The step's metrics, and the dense reference's results for both updates.
    """
    rows = zoo.rows("uneven")
    student, teacher = (dense.load_model(zoo.model(name)) for name in ("untied", "teacher"))
    beside = [] if given is None else [{**row, "given": True} for row in zoo.rows(given)]
    initial = None if reference is None else dense.load_model(zoo.model(reference))
    before = replace(SETTINGS, alpha=1.0, beta=0.0, support=settings.support)
    old = dense.kdrl_of_models(student, None, rows, before).log_probs
    first = sum(row["group_id"] == 0 for row in rows)  # of three groups, one and two
    results, total = [], {name: torch.zeros_like(value) for name, value in student.named_parameters()}
    half = len(beside) // 2
    for version, (part, share) in enumerate(((slice(0, first), slice(0, half)), (slice(first, None), slice(half, None)))):
        now = replace(settings, draw_seeds=(settings.draw_seeds[0], version))
        these = [*rows[part], *beside[share]]
        # A given response has no pi_old, and none of its uses needs one.
        log_old = [*old[part], *(torch.zeros(len(row["response_token_ids"]), dtype=torch.float64) for row in beside[share])]
        results.append(dense.kdrl_of_models(student, teacher, these, now, log_old=log_old, reference=initial))
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter -= lr * results[-1].gradients[name]
                total[name] += results[-1].gradients[name]
    overrides = [
        f"run.dir={run}",
        f"student.path={zoo.model('untied')}",
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('uneven')}",
        *([] if given is None else beside_given(zoo, given)),
        *objective_overrides(settings),
        "batch.updates_per_step=2",
        *PROBE,
        f"optimizer.lr={lr}",
        *FAST,
        *layout.split(),
    ]
    outcomes = pool.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes[0].stderr
    metrics = metrics_of(run)[0]
    names = ["loss", "policy_loss", "grad_norm"]
    names += ["kd_loss"] if settings.placement == "loss" else []
    for name in [*names, *(["reference_loss"] if reference else [])]:
        assert metrics[name] == about(sum(getattr(result, name) for result in results) / 2), name
    outside = torch.cat([1 - each for result in results for each in result.inside])
    assert metrics.get("outside_share", 0.0) == about(float(outside.mean()))
    first_weights, after = read_hf_weights(zoo.model("untied")), read_hf_weights(run / "hf")
    assert_gradients({name: (first_weights[name].double() - after[name].double()) / lr for name in after}, total)
    return metrics, results


def assert_log_probs(found: list, expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for values, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(values).double(), truth, rtol=TOLERANCE, atol=1e-5)


def about(value: float) -> Any:
    """Equal to within 1e-4. A loss is a sum of terms of order 1, so a loss that cancels to zero is zero to within 2e-6."""
    return pytest.approx(value, rel=TOLERANCE, abs=2e-6)


def beside_given(zoo: Zoo, name: str) -> list[str]:
    """Overrides that make a third of the responses given ones, in the order of the file."""
    return ["rollout.given.share=0.3333", f"rollout.given.path={zoo.rollouts(name)}", "data.shuffle=false"]


def assert_metrics(metrics: dict, expected: Result, settings: Settings, num_given: int = 0) -> None:
    assert metrics["loss"] == about(expected.loss)
    assert metrics["grad_norm"] == about(expected.grad_norm)
    own = len(expected.entropies) - num_given
    assert metrics["entropy"] == about(float(torch.cat(expected.entropies[:own]).mean()))
    assert metrics.get("given_responses", 0) == num_given
    assert metrics["policy_loss"] == about(expected.policy_loss)
    if settings.placement == "loss":
        assert metrics["kd_loss"] == about(expected.kd_loss)
    outside = float(torch.cat([1 - each for each in expected.inside]).mean())
    assert metrics.get("outside_share", 0.0) == about(outside)
    assert (settings.support != Settings.support) == (0 < outside < 0.9)
    scored, tokens = sum(expected.scored), sum(map(len, expected.log_probs))
    assert (metrics["teacher_tokens"], metrics["teacher_tokens_saved"]) == (scored, tokens - scored)


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every parameter's gradient agrees; its error is measured relative to its norm."""
    floor = NOISE_FLOOR * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    errors = {
        name: float((found[name] - gradient).norm()) / max(float(gradient.norm()), floor, 1e-12)
        for name, gradient in expected.items()
    }
    assert found.keys() == errors.keys()
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong


@dataclass(frozen=True)
class StudentLayout:
    """A layout of the student: its parallel sizes and the options that depend on them."""

    tensor: int
    pipeline: int
    context: int
    data: int
    sequence_parallel: bool = False
    virtual_pipeline: int | None = None

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def overrides(self) -> str:
        return (
            f"parallel.tensor={self.tensor} parallel.pipeline={self.pipeline} parallel.context={self.context} "
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()} "
            f"parallel.virtual_pipeline={'null' if self.virtual_pipeline is None else self.virtual_pipeline}"
        )

    def __str__(self) -> str:
        sizes = {"tp": self.tensor, "pp": self.pipeline, "cp": self.context, "dp": self.data}
        words = [f"{name}{size}" for name, size in sizes.items() if size > 1] or ["one rank"]
        return " ".join([*words, *(["sp"] if self.sequence_parallel else []), *(["vpp2"] if self.virtual_pipeline else [])])


def teacher_layout(student: StudentLayout) -> str:
    """A layout that differs from the student's, where there is one: pipeline parallel where the student is tensor parallel, or
    the reverse."""
    if student.ranks == 1:
        return ""
    tensor, pipeline = (1, 2) if student.tensor > 1 else (2, 1)
    if student.ranks == 4 and student.context * student.data > 1:
        tensor = pipeline = 2
    return f"teacher.parallel.tensor={tensor} teacher.parallel.pipeline={pipeline}"


def case(layout: StudentLayout, settings: Settings, rollouts: str = "uneven") -> Case:
    """A case with three or more micro-batches on each data-parallel rank. Four stages of two chunks need eight layers."""
    student = "deep" if layout.pipeline == 4 and layout.virtual_pipeline else "untied"
    overrides = f"{layout.overrides} {teacher_layout(layout)} batch.micro_tokens={60 // layout.data}"
    return Case(layout.ranks, overrides, settings, student=student, rollouts=rollouts)


def overrides_of(zoo: Zoo, run: Path, student: str, rollouts: str = "uneven") -> list[str]:
    """Overrides of a run that replays rollouts and distils as `SETTINGS` say."""
    return [
        f"run.dir={run}",
        f"student.path={zoo.model(student)}",
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts(rollouts)}",
        f"objective.beta.init={SETTINGS.beta}",
        *FAST,
    ]


def check_adam(ranks: int, layout: str, sharded: bool, zoo: Zoo, pool: RankPool, run: Path, rollouts: str = "uneven") -> None:
    """AdamW and clipping give the weights that torch gives. Weight decay applies to matrices only, as in Megatron-Core. A large
    epsilon keeps Adam from amplifying the rounding errors of gradients that are zero."""
    lr, decay, betas, epsilon, clip = 0.01, 0.1, (0.9, 0.95), 1e-3, 1.5
    student, teacher = (dense.load_model(zoo.model(name)) for name in ("untied", "teacher"))
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    groups = [
        {"params": [p for p in student.parameters() if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=epsilon)
    losses = []
    for _ in range(2):
        result = dense.kdrl_of_models(student, teacher, zoo.rows(rollouts), SETTINGS)
        losses.append(result.loss)
        torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        adam.step()
    moved = {name: start[name] - parameter.detach() for name, parameter in student.named_parameters()}

    overrides = [
        *overrides_of(zoo, run, "untied", rollouts),
        "trainer.steps=2",
        "optimizer.name=adam",
        f"optimizer.lr={lr}",
        f"optimizer.weight_decay={decay}",
        f"optimizer.adam_beta1={betas[0]}",
        f"optimizer.adam_beta2={betas[1]}",
        f"optimizer.adam_eps={epsilon}",
        f"optimizer.clip_grad={clip}",
        f"parallel.distributed_optimizer={str(sharded).lower()}",
        *layout.split(),
    ]
    outcomes = pool.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert [metrics["loss"] for metrics in metrics_of(run)] == [about(loss) for loss in losses]
    after = read_hf_weights(run / "hf")
    assert_gradients({name: start[name] - after[name].double() for name in start}, moved)

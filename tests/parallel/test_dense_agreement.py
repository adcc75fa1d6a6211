"""The trainer computes what one dense process computes with plain transformers and autograd: micro-batches, layouts of the
teacher, kinds of models and batches. `test_matrix.py` has every layout of the student.

Loss, log-probs of every token under student and teacher, and the gradient of every parameter, in float32, to 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import RankPool
from tests.reference.dense import Result, Settings
from tests.reference.tiny_models import read_hf_weights
from tests.training import FAST, PROBE, PROBE_LR, Outcome, metrics_of, objective_overrides, score_and_train_on_rank
from tests.zoo import Zoo

TOLERANCE = 1e-4
NOISE_FLOOR = 1e-3  # a parameter whose gradient is a smaller share of the whole is compared with this share of it
JOINT = Settings(alpha=1.0, beta=0.3)


@dataclass(frozen=True)
class Case:
    """One run: `overrides` give its layout, `settings` its objective."""

    ranks: int
    overrides: str = ""
    settings: Settings = JOINT
    student: str = "untied"
    teacher: str | None = "teacher"
    rollouts: str = "uneven"


LAYOUTS = {
    "tp1": Case(1),
    # micro-batches: one sequence each, a few, all in one
    "micro 1, tp1": Case(1, "batch.micro_tokens=1"),
    "micro 1, dp2": Case(2, "batch.micro_tokens=1"),
    "micro 1, pp2": Case(2, "batch.micro_tokens=1 parallel.pipeline=2"),
    "micro 40, tp2 sp": Case(2, "batch.micro_tokens=40 parallel.tensor=2 parallel.sequence_parallel=true"),
    "micro 40, pp2 interleaved": Case(2, "batch.micro_tokens=40 parallel.pipeline=2 parallel.virtual_pipeline=2"),
    "micro 40, tp2 dp2": Case(4, "batch.micro_tokens=40 parallel.tensor=2"),
    "micro 40, pp2 dp2": Case(4, "batch.micro_tokens=40 parallel.pipeline=2"),
    # the teacher's layout is another
    "tp2, teacher tp1": Case(2, "parallel.tensor=2 teacher.parallel.tensor=1"),
    "dp2, teacher tp2": Case(2, "teacher.parallel.tensor=2"),
    "dp2, teacher pp2": Case(2, "teacher.parallel.pipeline=2 batch.micro_tokens=40"),
    "tp2, teacher pp2": Case(2, "parallel.tensor=2 teacher.parallel.pipeline=2"),
    "pp2, teacher tp2": Case(2, "parallel.pipeline=2 teacher.parallel.tensor=2"),
    "tp2 sp, teacher pp2": Case(2, "parallel.tensor=2 parallel.sequence_parallel=true teacher.parallel.pipeline=2"),
    "tp2 pp2, teacher dp2 pp2": Case(4, "parallel.tensor=2 parallel.pipeline=2 teacher.parallel.pipeline=2"),
    "pp4, teacher tp2": Case(4, "parallel.pipeline=4 teacher.parallel.tensor=2"),
    "dp4, teacher tp2 pp2": Case(4, "teacher.parallel.tensor=2 teacher.parallel.pipeline=2"),
    # activations recomputed in the backward pass
    "recompute, tp2 sp": Case(2, "parallel.tensor=2 parallel.sequence_parallel=true parallel.recompute=full"),
    "recompute, pp2": Case(2, "parallel.pipeline=2 parallel.recompute=full batch.micro_tokens=40"),
}

MODELS = {
    "tied, tp1": Case(1, student="tied"),
    "tied, tp2": Case(2, "parallel.tensor=2", student="tied"),
    "tied, pp2": Case(2, "parallel.pipeline=2", student="tied"),
    "tied, tp2 pp2 sp": Case(4, "parallel.tensor=2 parallel.pipeline=2 parallel.sequence_parallel=true", student="tied"),
    "tied, pp2 interleaved": Case(2, "parallel.pipeline=2 parallel.virtual_pipeline=2", student="tied"),
    "tied, pp2 dp2": Case(4, "parallel.pipeline=2", student="tied"),
    "one kv head, tp2": Case(2, "parallel.tensor=2", student="one_kv_head"),
    "one kv head, tp4 sp": Case(4, "parallel.tensor=4 parallel.sequence_parallel=true", student="one_kv_head"),
    "the models' columns are the vocabulary, tp1": Case(1, student="no_tokenizer", teacher="teacher_no_tokenizer"),
    "the models' columns are the vocabulary, tp2": Case(
        2, "parallel.tensor=2", student="no_tokenizer", teacher="teacher_no_tokenizer"
    ),
    "teacher kv heads fewer than its tp": Case(2, "teacher.parallel.tensor=2", teacher="one_kv_head"),
}

BATCHES = {
    "equal rewards, tp2": Case(2, "parallel.tensor=2", rollouts="all_correct"),
    "equal rewards without a teacher, dp2": Case(2, settings=Settings(), teacher=None, rollouts="all_correct"),
    "everything masked, tp2": Case(2, "parallel.tensor=2", replace(JOINT, mask="response"), rollouts="all_correct"),
    "everything masked, pp2": Case(2, "parallel.pipeline=2", replace(JOINT, mask="group"), rollouts="all_correct"),
    "two rollouts, dp4: two ranks have no tokens": Case(4, rollouts="two"),
    "two rollouts, pp2 dp2": Case(4, "parallel.pipeline=2 batch.micro_tokens=1", rollouts="two"),
    "one rollout, dp2: a rank has no tokens": Case(2, settings=replace(JOINT, alpha=0.0), rollouts="one"),
    "one rollout, tp2 dp2 sp": Case(
        4, "parallel.tensor=2 parallel.sequence_parallel=true", replace(JOINT, alpha=0.0), rollouts="one"
    ),
    "one rollout, teacher dp2": Case(
        2, "parallel.tensor=2 teacher.parallel.tensor=1", replace(JOINT, alpha=0.0), rollouts="one"
    ),
    "one rollout, pp2 interleaved: an empty micro-batch": Case(
        2, "parallel.pipeline=2 parallel.virtual_pipeline=2", replace(JOINT, alpha=0.0), rollouts="one"
    ),
}

CASES = {**LAYOUTS, **MODELS, **BATCHES}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_loss_log_probs_and_gradients_are_those_of_the_dense_reference(
    case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(case, zoo, pools[case.ranks], tmp_path)


def check(
    case: Case, zoo: Zoo, pool: RankPool, run: Path, on_rank: Callable[[Sequence[str]], Outcome] = score_and_train_on_rank
) -> None:
    """Run the case on the pool and compare everything with the dense reference."""
    settings = replace(case.settings, vocabulary=zoo.vocabulary(case.student))
    expected = zoo.reference(case.student, case.teacher, case.rollouts, settings)
    overrides = [
        f"run.dir={run}",
        f"student.path={zoo.model(case.student)}",
        *([] if case.teacher is None else [f"teacher.path={zoo.model(case.teacher)}"]),
        "rollout=replay",
        f"rollout.path={zoo.rollouts(case.rollouts)}",
        *objective_overrides(settings),
        *PROBE,
        *FAST,
        *case.overrides.split(),
    ]
    outcomes = pool.run(on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * case.ranks, outcomes[0].stderr
    for outcome in outcomes:  # every rank holds all of the scores
        assert_log_probs(outcome.found["student"], expected.log_probs)
        assert_log_probs(outcome.found["entropy"], expected.entropies)
        assert_log_probs(outcome.found["teacher"], expected.teacher_log_probs)
    assert_metrics(metrics_of(run)[0], expected, settings)
    before, after = read_hf_weights(zoo.model(case.student)), read_hf_weights(run / "hf")
    assert before.keys() == after.keys()
    found = {name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}
    assert_gradients(found, expected.gradients)


def assert_log_probs(found: list, expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for values, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(values).double(), truth, rtol=TOLERANCE, atol=1e-5)


def about(value: float) -> Any:
    """Equal to 1e-4; a loss is a sum of terms of order 1, so one that cancels to zero is so to 2e-6."""
    return pytest.approx(value, rel=TOLERANCE, abs=2e-6)


def assert_metrics(metrics: dict, expected: Result, settings: Settings) -> None:
    assert metrics["loss"] == about(expected.loss)
    assert metrics["grad_norm"] == about(expected.grad_norm)
    assert metrics["entropy"] == about(float(torch.cat(expected.entropies).mean()))
    assert metrics["policy_loss"] == about(expected.policy_loss)
    if settings.placement == "loss":
        assert metrics["kd_loss"] == about(expected.kd_loss)
    kept, left = (
        sum(
            len(log_probs)
            for log_probs, distilled in zip(expected.log_probs, expected.distilled, strict=True)
            if distilled == on
        )
        for on in (True, False)
    )
    assert (metrics["teacher_tokens"], metrics["teacher_tokens_saved"]) == (kept, left)


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each parameter's gradient, its error measured against its own norm."""
    floor = NOISE_FLOOR * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    errors = {
        name: float((found[name] - gradient).norm()) / max(float(gradient.norm()), floor, 1e-12)
        for name, gradient in expected.items()
    }
    assert found.keys() == errors.keys()
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong

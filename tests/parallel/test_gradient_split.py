"""The two gradients of the joint loss, measured separately: their norms and their cosine are those of the dense reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference.dense import Settings
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROBE, PROBE_LR, metrics_of, train_on_rank
from tests.support.zoo import TOKENS, Zoo


@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_norms_and_cosine_of_both_gradients(estimator: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    outcomes = ranks2.run(
        train_on_rank,
        [
            *FAST,
            *PROBE,
            "parallel.tensor=2",
            "logging.gradient_split_every=1",
            f"run.dir={tmp_path}",
            f"student.path={zoo.model('untied')}",
            f"teacher.path={zoo.model('teacher')}",
            "rollout=replay",
            f"rollout.path={zoo.rollouts('uneven')}",
            "objective.beta.init=0.5",
            f"objective.kd.estimator={estimator}",
            "checkpoint.export_hf=false",
        ],
    )
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    joint = Settings(beta=0.5, estimator=estimator, vocab_size=TOKENS)
    policy, distillation = (
        zoo.reference("untied", "teacher", "uneven", part) for part in (replace(joint, beta=0.0), replace(joint, alpha=0.0))
    )
    dot = sum(float((policy.gradients[name] * distillation.gradients[name]).sum()) for name in policy.gradients)
    measured = metrics_of(tmp_path)[-1]
    assert measured["lr"] == PROBE_LR
    assert measured["grad_norm_policy"] == pytest.approx(policy.grad_norm, rel=1e-4)
    assert measured["grad_norm_kd"] == pytest.approx(distillation.grad_norm, rel=1e-4)
    assert measured["grad_cosine"] == pytest.approx(dot / (policy.grad_norm * distillation.grad_norm), abs=1e-4)

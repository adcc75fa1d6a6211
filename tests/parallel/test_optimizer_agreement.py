"""Clipping and AdamW, sharded over data-parallel ranks or not, are those of torch on the dense gradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.parallel.test_dense_agreement import JOINT, about, assert_gradients
from tests.ranks import RankPool
from tests.reference import dense
from tests.reference.tiny_models import read_hf_weights
from tests.training import FAST, PROBE, PROBE_LR, metrics_of, train_on_rank
from tests.zoo import TOKENS, Zoo

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2, ""),
    "tp2 dp2": (4, "parallel.tensor=2"),
}
SETTINGS = replace(JOINT, vocabulary=TOKENS)


def overrides_of(zoo: Zoo, run: Path, student: str, rollouts: str = "uneven") -> list[str]:
    return [
        f"run.dir={run}",
        f"student.path={zoo.model(student)}",
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts(rollouts)}",
        f"objective.beta.init={SETTINGS.beta}",
        *FAST,
    ]


@pytest.mark.parametrize("student", ["untied", "tied"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_clipping_divides_by_the_norm_of_the_whole_gradient(
    ranks: int, layout: str, student: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    expected = zoo.reference(student, "teacher", "uneven", SETTINGS)
    assert expected.grad_norm > 1.0
    overrides = [*overrides_of(zoo, tmp_path, student), *PROBE, "optimizer.clip_grad=0.5", *layout.split()]
    outcomes = pools[ranks].run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert metrics_of(tmp_path)[0]["grad_norm"] == about(expected.grad_norm)
    before, after = read_hf_weights(zoo.model(student)), read_hf_weights(tmp_path / "hf")
    clipped = {name: gradient * 0.5 / expected.grad_norm for name, gradient in expected.gradients.items()}
    assert_gradients({name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}, clipped)


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_two_steps_of_adam_are_those_of_torch(
    ranks: int, layout: str, sharded: bool, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check_adam(ranks, layout, sharded, zoo, pools[ranks], tmp_path)


def check_adam(ranks: int, layout: str, sharded: bool, zoo: Zoo, pool: RankPool, run: Path, rollouts: str = "uneven") -> None:
    """Weight decay is on matrices only, as in Megatron-Core. A large epsilon keeps Adam from blowing up the rounding of
    gradients that are zero."""
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

"""Clipping and AdamW, sharded over data-parallel ranks or not, give what torch gives for the dense gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference.tiny_models import read_hf_weights
from tests.support.agreement import SETTINGS, about, assert_gradients, check_adam, overrides_of
from tests.support.ranks import RankPool
from tests.support.training import PROBE, PROBE_LR, metrics_of, train_on_rank
from tests.support.zoo import Zoo

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2, ""),
    "tp2 dp2": (4, "parallel.tensor=2"),
}


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

"""Training in bfloat16 on layouts: the gradient is the dense float32 reference's to bfloat16's rounding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.reference.tiny_models import read_hf_weights
from tests.support.agreement import SETTINGS, overrides_of
from tests.support.ranks import RankPool
from tests.support.training import PROBE, PROBE_LR, Outcome, metrics_of, train_on_rank
from tests.support.zoo import Zoo

LAYOUTS = {
    "tp2 sp": (2, "parallel.tensor=2 parallel.sequence_parallel=true"),
    "tp2 pp2 sp": (4, "parallel.tensor=2 parallel.pipeline=2 parallel.sequence_parallel=true batch.micro_tokens=40"),
    "cp2": (2, "parallel.context=2"),
    "dp2": (2, ""),
}


def train_on_nan_memory_on_rank(overrides: Sequence[str]) -> Outcome:
    """`train_on_rank` where torch hands out uninitialised memory full of NaN: none of it may reach a gradient."""
    torch.use_deterministic_algorithms(True)
    try:
        return train_on_rank(overrides)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_the_gradient_is_float32s_to_bfloat16s_rounding(
    ranks: int, layout: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    expected = zoo.reference("untied", "teacher", "uneven", SETTINGS)
    overrides = [*overrides_of(zoo, tmp_path, "untied"), *PROBE, "model.dtype=bfloat16", *layout.split()]
    outcomes = pools[ranks].run(train_on_nan_memory_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    before, after = read_hf_weights(zoo.model("untied")), read_hf_weights(tmp_path / "hf")
    assert metrics_of(tmp_path)[0]["grad_norm"] == pytest.approx(expected.grad_norm, rel=2.0**-8)
    gradient = {name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}
    for name, right in expected.gradients.items():
        # The smallest, of key biases, are sums that nearly cancel.
        assert (gradient[name] - right).norm() <= 0.15 * right.norm(), name
    own, right = (torch.cat([of[name].flatten().double() for name in before]) for of in (gradient, expected.gradients))
    assert (own - right).norm() <= 20 * 2.0**-9 * right.norm()
    assert torch.cosine_similarity(own, right, dim=0) >= 0.999

"""A student trained by LoRA computes what `peft` computes in one dense process: loss, log-probs of every token, and the
gradient of every factor, in every kind of layout; the merged student is the unmerged one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from tests.reference import adapters
from tests.reference.tiny_models import read_hf_weights
from tests.support.agreement import SETTINGS, about, assert_gradients, assert_log_probs
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROBE, PROBE_LR, metrics_of, objective_overrides, score_and_train_on_rank
from tests.support.zoo import Zoo

RANK, ALPHA = 4, 6.0
LORA = [f"student.lora.rank={RANK}", f"student.lora.alpha={ALPHA}"]
SP = "parallel.sequence_parallel=true"
LAYOUTS = {
    "one rank": (1, ""),
    "tp2": (2, "parallel.tensor=2"),
    "tp2 sp": (2, f"parallel.tensor=2 {SP} batch.micro_tokens=40"),
    "pp2": (2, "parallel.pipeline=2 batch.micro_tokens=40"),
    "cp2": (2, "parallel.context=2"),
    "dp2": (2, "batch.micro_tokens=40"),
    "tp2 pp2": (4, "parallel.tensor=2 parallel.pipeline=2"),
    "tp2 pp2 interleaved sp": (4, f"parallel.tensor=2 parallel.pipeline=2 parallel.virtual_pipeline=2 {SP}"),
    "pp2 recomputed": (2, "parallel.pipeline=2 parallel.recompute=full"),
    "tp2 sp recomputed": (2, f"parallel.tensor=2 {SP} parallel.recompute=selective"),
}


@pytest.fixture(scope="module", params=["untied", "tied"])
def student(request: pytest.FixtureRequest, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("adapter")
    return request.param, adapters.make_adapter(zoo.model(request.param), folder, seed=7, rank=RANK, alpha=ALPHA)


@pytest.fixture(scope="module")
def untied(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.make_adapter(
        zoo.model("untied"), tmp_path_factory.mktemp("adapter"), seed=7, rank=RANK, alpha=ALPHA
    )


@pytest.mark.parametrize("ranks, layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_loss_log_probs_and_gradients_are_those_of_peft(
    ranks: int, layout: str, zoo: Zoo, untied: Path, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    expected, gradients = adapters.kdrl_of_adapters(
        zoo.model("untied"), untied, zoo.model("teacher"), zoo.rows("uneven"), SETTINGS
    )
    run = tmp_path / "run"
    overrides = [
        f"run.dir={run}",
        f"student.path={zoo.model('untied')}",
        f"student.lora.path={untied}",
        *LORA,
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('uneven')}",
        *objective_overrides(SETTINGS),
        *PROBE,
        *FAST,
        *layout.split(),
    ]
    outcomes = pools[ranks].run(score_and_train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    for outcome in outcomes:
        assert_log_probs(outcome.found["student"], expected.log_probs)
    (metrics,) = metrics_of(run)
    assert metrics["loss"] == about(expected.loss)
    before, after = adapters.read_factors(untied), adapters.read_factors(run / "adapter")
    assert before.keys() == after.keys()
    found = {name: (before[name].double() - after[name].double()) / PROBE_LR for name in before}
    assert_gradients(found, gradients)
    assert metrics["grad_norm"] == about(float(torch.stack([each.norm() for each in gradients.values()]).norm()))

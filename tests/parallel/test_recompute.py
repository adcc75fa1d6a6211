"""Selective recompute, module by module: the loss and every gradient are those of the dense reference, each module runs forward
again in the backward pass, and the memory that it saves is free in between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.reference.tiny_models import make_model, make_qwen2
from tests.support import expert_training
from tests.support.agreement import Case, check, overrides_of
from tests.support.ranks import RankPool
from tests.support.recompute_ranks import forward_calls_on_rank
from tests.support.training import PROBE
from tests.support.zoo import Zoo

LAYOUTS = {
    "tp2 sp": "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=40",
    "pp2": "parallel.pipeline=2 batch.micro_tokens=40",
    "pp2 interleaved": "parallel.pipeline=2 parallel.virtual_pipeline=2 batch.micro_tokens=40",
    "cp2": "parallel.context=2",
}
DENSE = ["core_attn", "layernorm", "mlp", "core_attn,layernorm,mlp"]
CALLED = {"core_attn": ".core_attention", "layernorm": "layernorm", "mlp": ".mlp"}
"""A part of the names of the modules that run again, by the name of the setting."""


def selective(modules: str) -> str:
    return f"parallel.recompute=selective parallel.recompute_modules=[{modules}]"


@pytest.mark.parametrize("modules", DENSE)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_loss_log_probs_and_gradients_are_those_of_the_dense_reference(
    layout: str, modules: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path
) -> None:
    check(Case(2, f"{layout} {selective(modules)}"), zoo, ranks2, tmp_path)


@pytest.mark.parametrize("modules", ["moe", "layernorm", "core_attn,layernorm,moe"])
@pytest.mark.parametrize(
    "layout",
    ["parallel.expert=2", "parallel.tensor=2 parallel.sequence_parallel=true parallel.expert=2"],
    ids=["ep2", "tp2 sp ep2"],
)
def test_a_mixture_of_experts_learns_as_the_dense_reference(
    layout: str, modules: str, ranks2: RankPool, tmp_path: Path
) -> None:
    student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
    teacher = make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
    probe = expert_training.make_probe(tmp_path, student, teacher)
    expert_training.check(probe, ranks2, [*layout.split(), *selective(modules).split()], tmp_path / "run")


def calls(pool: RankPool, overrides: Sequence[str]) -> dict[str, int]:
    """How often each module of a layer ran forward in an update of one micro-batch, on the first rank."""
    return pool.run(forward_calls_on_rank, list(overrides))[0]


@pytest.mark.parametrize("modules", ["none", *DENSE])
def test_exactly_the_named_modules_run_again(modules: str, zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    settings = [] if modules == "none" else selective(modules).split()
    counted = calls(ranks1, [*overrides_of(zoo, tmp_path, "untied"), *PROBE, "batch.micro_tokens=4096", *settings])
    assert counted
    for name, count in counted.items():
        named = any(CALLED[module] in name for module in modules.split(",") if module != "none")
        assert count == 1 + named, name

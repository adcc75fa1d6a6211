"""Transformer Engine's layers, imitated by `tests/support/stubs`, on paper CUDA, where the program finds them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paper_cuda import choose_gpu, import_training
from tests.support.agreement import overrides_of
from tests.support.ranks import RankPool
from tests.support.te_ranks import STUBS, updates_on_rank
from tests.support.training import metrics_of, train_on_rank
from tests.support.zoo import Zoo

LAYOUT = "parallel.tensor=2 parallel.sequence_parallel=true batch.micro_tokens=40"


@pytest.fixture(scope="module")
def te_gpus() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[STUBS], preload=import_training, prepare=choose_gpu, backend="cpu:gloo,cuda:nccl")
    yield pool
    pool.close()


@pytest.mark.parametrize("share_prompts", [False, True])
def test_loss_and_gradient_norm_in_bfloat16_are_those_of_the_local_layers_on_the_cpu(
    share_prompts: bool, zoo: Zoo, te_gpus: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """Shared prompts use our attention and Transformer Engine's other layers."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, pool, on_rank in (("gpu", te_gpus, updates_on_rank), ("cpu", ranks2, train_on_rank)):
        run = tmp_path / name
        settings = [*overrides_of(zoo, run, "untied"), *LAYOUT.split(), "model.dtype=bfloat16", "optimizer.lr=0.001"]
        if name == "gpu":
            settings.append(f"batch.share_prompts={str(share_prompts).lower()}")
        outcomes = pool.run(on_rank, [*settings, "trainer.steps=2"], timeout=250)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        found[name] = metrics_of(run)
        if name == "gpu":
            assert outcomes[0].found["decoder.layers.0.mlp.linear_fc1.weight"]  # the layers were Transformer Engine's
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found["gpu"]] == [pytest.approx(step[key], rel=1e-2) for step in found["cpu"]], key


KEPT = {
    "attention and MLP off-loaded": "parallel.offload_activations=[qkv_linear,core_attn,attn_proj,mlp]",
    "attention off-loaded, MLP recomputed": "parallel.recompute=selective "
    "parallel.offload_activations=[qkv_linear,core_attn,attn_proj]",
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=list(KEPT))
def test_activations_that_wait_on_the_host_change_nothing(kept: str, zoo: Zoo, te_gpus: RankPool, tmp_path: Path) -> None:
    """Weights keep the attributes by which layers add to the main gradients, also while these are being reduced."""
    found = []
    for name, settings in (("plain", ""), ("kept", f"{kept} parallel.offload_min_elements=1")):
        words = f"{LAYOUT} model.dtype=bfloat16 optimizer.lr=0.001 trainer.steps=2 parallel.overlap_grad_reduce=true {settings}"
        outcomes = te_gpus.run(updates_on_rank, [*overrides_of(zoo, tmp_path / name, "untied"), *words.split()], timeout=250)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        assert outcomes[0].found["decoder.layers.0.self_attention.linear_qkv.weight"]
        found.append(metrics_of(tmp_path / name))
    for key in ("loss", "grad_norm"):
        assert [step[key] for step in found[1]] == [step[key] for step in found[0]], key

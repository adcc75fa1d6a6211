"""A refit gives every engine the bytes of the student's weights, from any layout and by either transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import paper_cuda
from tests.reference.tiny_models import make_model
from tests.support import refit_ranks
from tests.support.hf_folders import all_tensors
from tests.support.ranks import RankPool
from tests.support.receiver import Process, assert_holds


@pytest.fixture(scope="module")
def receiver() -> Iterator[Process]:
    """A server of two workers."""
    process = Process(2)
    yield process
    process.close()


@pytest.mark.parametrize("colocated", [True, False], ids=["memory", "broadcast"])
@pytest.mark.parametrize(
    "ranks, family, layout, settings",
    [
        (2, "qwen2", {"tensor": 2}, {"vocab_size": 67}),
        (2, "qwen2", {"pipeline": 2}, {"tie_word_embeddings": True}),
        (2, "phi3", {"tensor": 2}, {}),
        (2, "olmo2", {"tensor": 2}, {}),
        (2, "glm4_moe", {"expert": 2}, {}),
        (2, "qwen3_moe", {"tensor": 2, "expert": 2, "sequence_parallel": True}, {}),
        (4, "qwen3_moe", {"tensor": 2, "pipeline": 2, "expert": 2, "sequence_parallel": True}, {"vocab_size": 67}),
    ],
    ids=["tp2-padded", "pp2-tied", "tp2-fused", "tp2-norm", "ep2", "tp2-ep2", "tp2-pp2-ep2-padded"],
)
def test_every_worker_gets_the_bytes(
    ranks: int,
    family: str,
    layout: dict[str, Any],
    settings: dict[str, Any],
    colocated: bool,
    pools: dict[int, RankPool],
    receiver: Process,
    tmp_path: Path,
) -> None:
    hf = make_model(family, tmp_path / "hf", seed=6, **settings)
    results = pools[ranks].run(_refit, str(hf), layout, {0: [receiver.port]}, {"colocated": colocated})
    assert "error" not in results[0], results[0]
    assert_holds(receiver, hf, tmp_path)
    assert len({result["digest"] for result in results}) == 1
    assert results[0]["num_bytes"] == sum(tensor.nbytes for tensor in all_tensors(hf).values())
    assert receiver.client().post("version", {}) == 3


def test_each_rank_serves_the_worker_on_its_own_gpu(tmp_path: Path) -> None:
    """Both ends of CUDA IPC on paper CUDA: a worker on a GPU other than that of the rank that serves it would be refused."""
    hf = make_model("qwen3_moe", tmp_path / "hf", seed=6)
    gpus = {"preload": paper_cuda.import_training, "prepare": paper_cuda.choose_gpu, "backend": "cpu:gloo,cuda:nccl"}
    ranks, receiver = RankPool(2, **gpus), Process(2, "cuda")
    try:
        layout = {"tensor": 2, "expert": 2, "sequence_parallel": True}
        results = ranks.run(_refit, str(hf), layout, {0: [receiver.port]}, {})
        assert "error" not in results[0], results[0]
        assert_holds(receiver, hf, tmp_path)
    finally:
        ranks.close()
        receiver.close()


def test_adapters_arrive_merged(ranks2: RankPool, receiver: Process, tmp_path: Path) -> None:
    """The bytes are those of the run's export, not those of the frozen weights."""
    hf, exported = make_model("qwen2", tmp_path / "hf", seed=6), tmp_path / "exported"
    results = ranks2.run(refit_ranks.refit_adapted, str(hf), {"tensor": 2}, receiver.port, str(exported))
    assert_holds(receiver, exported, tmp_path)
    assert len({result["digest"] for result in results}) == 1
    frozen, merged = all_tensors(hf), all_tensors(exported)
    changed = {name for name in merged if not merged[name].equal(frozen[name])}
    assert changed == {name for name in merged if name.endswith("_proj.weight")}


def _refit(path: str, layout: dict[str, Any], ports: dict[int, list[int]], settings: dict[str, Any]) -> dict[str, Any]:
    return refit_ranks.refit(path, layout, ports, **settings)

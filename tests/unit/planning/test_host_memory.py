"""The memory that ranks without GPUs need at least."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.planning import host_memory
from tests.reference.tiny_models import make_qwen2

GIB = host_memory.GIB


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_qwen2(tmp_path_factory.mktemp("models") / "model", seed=1, vocab_size=64))


def config_of(model: Path, *overrides: str) -> Config:
    return load_config([f"student.path={model}", f"teacher.path={model}", *overrides])


@pytest.mark.parametrize(
    ("overrides", "per_weight"),
    [
        ("objective=kdrl", 4 * 4 + 4 * 4 + 8 + 4 * 4),  # four replicas of the student and of the teacher
        ("objective=kdrl teacher.path=null teachers.a.path={model} teachers.b.path={model}", 4 * 4 + 4 * 4 + 8 + 2 * 4 * 4),
        ("objective=grpo", 4 * 4 + 4 * 4 + 8),
        ("objective=grpo parallel.tensor=2", 2 * 4 + 2 * 4 + 8),
        ("objective=grpo parallel.pipeline=2 parallel.context=2", 2 * 4 + 2 * 4 + 8),
        ("objective=grpo parallel.distributed_optimizer=false", 4 * (4 + 4 + 8)),
        ("objective=grpo optimizer.name=sgd", 4 * 4 + 4 * 4),
        ("objective=grpo model.dtype=bfloat16", 4 * 2 + 4 * 4 + 12),
        ("objective=grpo student.lora.rank=4", 4 * 4),
        ("objective=grpo objective.reference_kl.coefficient=0.1", 4 * 4 + 4 * 4 + 8 + 4 * 4),
    ],
)
def test_the_bytes_of_a_weight_on_four_ranks(overrides: str, per_weight: int, model: Path) -> None:
    weights = host_memory.num_parameters(host_memory.read_architecture(str(model)))
    config = config_of(model, *overrides.format(model=model).split())
    config.model.dtype = config.model.dtype if "dtype" in overrides else "float32"
    assert host_memory.least_bytes(config, 4) == per_weight * weights


@pytest.mark.parametrize(("local", "engines", "fits"), [(2, 0.0, True), (4, 0.0, False), (2, 1.5, False)])
def test_a_machine_with_less_than_its_ranks_need_is_named(
    local: int, engines: float, fits: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(host_memory, "least_bytes", lambda config, ranks: 10.0 * GIB)
    monkeypatch.setattr(host_memory, "free_memory", lambda: 6 * GIB)
    said = host_memory.too_little_memory(config_of(model), engines)
    assert (said is None) == fits
    if said is not None:
        assert f"has 6.0 GiB of free memory, and its {local} rank(s) need more than {2.5 * local + engines:.1f} GiB" in said
        assert ("vLLM's engines" in said) == bool(engines)

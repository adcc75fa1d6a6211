"""Which rank starts which engine on which GPUs, and what the configuration refuses."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning.shards import SHAPES
from kdrl_mcore.preflight import configuration
from kdrl_mcore.rollout.vllm import placement as vllm_placement

VLLM = ["rollout=vllm", "objective=grpo"]


def config(*overrides: str) -> Config:
    return load_config([*VLLM, *(f"rollout.vllm.{override}" for override in overrides)])


def in_a_job(monkeypatch: pytest.MonkeyPatch, world_size: int, local: int, local_rank: int = 0) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize(
    ("overrides", "owners"),
    [
        (["tensor=4"], [0, 4, 8, 12]),
        (["tensor=8", "replicas=1"], [0]),
        (["placement=server", "replicas=3"], [0, 0, 0]),
        (["placement=server"], [0]),
    ],
)
def test_owners(overrides: Sequence[str], owners: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, world_size=16, local=8)
    assert vllm_placement.find_owners(config(*overrides)) == owners


@pytest.mark.parametrize(
    ("overrides", "message"), [(["tensor=3"], "does not divide the 8 ranks"), (["tensor=4", "replicas=5"], "at most 4")]
)
def test_engines_that_do_not_fit_are_refused(overrides: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, world_size=16, local=8)
    with pytest.raises(ConfigError, match=message):
        vllm_placement.find_owners(config(*overrides))


@pytest.mark.parametrize(
    ("student", "tensor", "found"),
    [
        ("DeepSeek-R1-Distill-Qwen-32B", 8, "2 engines of tensor 8"),
        ("Qwen2.5-3B", 8, "2 engines of tensor 8"),  # 2 key/value heads, each on 4 GPUs
        ("DeepSeek-R1-Distill-Qwen-1.5B", 8, "does not divide the student's 12 heads"),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1, "16 engines of tensor 1"),
    ],
)
def test_the_preflight_looks_at_the_engines(student: str, tensor: int, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job(monkeypatch, world_size=16, local=8)
    monkeypatch.setattr(configuration, "check_installed", lambda: None)
    settings = config(f"tensor={tensor}")
    settings.student.path = str(SHAPES / student)
    try:
        answer = configuration.check_engines(settings)
    except ConfigError as error:
        answer = str(error)
    assert found in answer


def test_a_colocated_engine_has_its_ranks_gpus_and_a_server_those_that_no_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3,2,1,0")
    in_a_job(monkeypatch, world_size=16, local=8, local_rank=4)  # engine 3 of the second node
    assert vllm_placement._environment(config("tensor=4"), 3) == {"CUDA_VISIBLE_DEVICES": "3,2,1,0"}
    in_a_job(monkeypatch, world_size=4, local=4)
    server = config("placement=server", "tensor=2", "replicas=3")
    assert vllm_placement._environment(server, 1) == {"CUDA_VISIBLE_DEVICES": "1,0"}
    with pytest.raises(ConfigError, match="engine 2 needs 2 GPUs in addition to those of 4 ranks, but the node has 8"):
        vllm_placement._environment(server, 2)


def test_an_engine_without_a_gpu_has_its_ranks_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine of a machine would otherwise start a thread for every core."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert vllm_placement._environment(config(), 0) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(("single_node", "host"), [(True, "127.0.0.1"), (False, "10.0.0.5")])
def test_servers_bind_to_loopback_or_to_the_interface_of_the_job(
    single_node: bool, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_placement, "check_installed", lambda: None)
    monkeypatch.setattr(vllm_placement, "own_address", lambda host: {"10.0.0.1": "10.0.0.5"}[host])
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    words = vllm_placement._arguments(config(), 61, single_node, 0.7)
    assert words[words.index("--host") + 1] == host
    assert words[words.index("--gpu-memory-utilization") + 1] == "0.7"
    assert words[words.index("--load-format") + 1] == "dummy"  # a refit replaces the weights, so none are read from disk


def test_without_vllm_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs vLLM, which is not installed: pip install"):
        vllm_placement.check_installed()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("placement=elsewhere", "is not one of: colocated, server"),
        ("tensor=0", "must be at least 1"),
        ("gpu_memory_utilization=1.5", "must be greater than 0 and at most 1"),
        ("restarts=-1", "must be at least 0"),
        ("servers=[node1:8000]", "needs rollout.vllm.placement=server"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_addresses_are_checked() -> None:
    assert config("placement=server", "servers=[node1:8000,10.0.0.2:8001]").rollout.vllm.servers == [
        "node1:8000",
        "10.0.0.2:8001",
    ]
    with pytest.raises(ConfigError, match="'node1' is not host:port"):
        config("placement=server", "servers=[node1]")
    with pytest.raises(ConfigError, match=r"replicas=3 but .* names 1"):
        config("placement=server", "servers=[node1:1]", "replicas=3")


def test_vllm_switches_the_sampler_correction_on_and_an_override_off() -> None:
    assert config().objective.sampler_correction.kind == "truncate"
    assert load_config([*VLLM, "objective.sampler_correction.kind=none"]).objective.sampler_correction.kind == "none"

"""Training frees its GPU memory before a colocated engine allocates, and an engine gets the right environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from kdrl_mcore.config import load_config
from kdrl_mcore.rollout.vllm import engine as vllm
from kdrl_mcore.rollout.vllm import gpu_memory
from kdrl_mcore.rollout.vllm import placement as vllm_placement
from kdrl_mcore.rollout.vllm.client import ServerFailed, engine_environment
from kdrl_mcore.rollout.vllm.engine import VllmEngine
from kdrl_mcore.rollout.vllm.gpu_memory import free_share, without_expandable_segments
from kdrl_mcore.rollout.vllm.placement import Replicas, start_replicas
from tests.support.ranks import RankPool

GIB = 2**30


class Engine:
    """An engine server that records its requests."""

    index, address, token, log = 0, "127.0.0.1:1", "secret", Path("log")

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def set_address(self, address: str | None, token: str | None) -> None:
        self.address, self.token = address, token

    def start(self) -> None:
        self.events.append("start")

    def restart(self) -> None:
        self.events.append("restart")

    def wait_until_ready(self, on_wait: Any) -> None:
        self.events.append("ready")

    def wake(self, tags: list[str]) -> None:
        self.events.append(f"wake {tags}")

    def health(self) -> dict[str, Any]:
        return {"usable": True, "version": 3}


class Student:
    parts, version = None, 3

    def wait_for_weights(self) -> None:
        pass


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sequence of events on the only rank of a world; steps that need a GPU are only recorded."""
    events: list[str] = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)

    def gather(item: Any) -> list[Any]:
        if item is None:
            events.append("all have")
        return [item]

    monkeypatch.setattr(vllm_placement, "gather_objects", gather)
    monkeypatch.setattr(vllm_placement, "drop_gathering_buffer", lambda: events.append("drop"))
    monkeypatch.setattr(vllm_placement, "give_back", lambda: events.append("give back"))
    monkeypatch.setattr(vllm, "send_weights", lambda *args, **settings: events.append("refit") or _Sent())
    return events


class _Sent:
    version, num_bytes, seconds = 3, 0, 0.0


ROOM = ["drop", "give back", "all have"]


@pytest.mark.parametrize("placement", ["colocated", "server"])
def test_every_rank_gives_its_cache_back_before_weights_and_before_the_kv_cache(events: list[str], placement: str) -> None:
    config = load_config(["rollout=vllm", "objective=grpo", f"rollout.vllm.placement={placement}"])
    replicas = Replicas([Engine(events)], [0], placement == "colocated")  # type: ignore[list-item]
    VllmEngine(replicas, config.rollout, None, None, vocab_size=9).refit(Student())  # type: ignore[arg-type]
    room = ROOM if placement == "colocated" else []
    assert events == [*room, "wake ['weights']", "refit", *room, "wake ['kv_cache']"]


def test_an_engine_that_fails_to_wake_finds_room_when_it_starts_again_and_when_it_wakes(events: list[str]) -> None:
    class Tight(Engine):
        def wake(self, tags: list[str]) -> None:
            super().wake(tags)
            if events.count("wake ['weights']") == 1:
                raise ServerFailed("out of memory")

    config = load_config(["rollout=vllm", "objective=grpo", "rollout.vllm.placement=colocated"])
    replicas = Replicas([Tight(events)], [0], True)  # type: ignore[list-item]
    VllmEngine(replicas, config.rollout, None, None, vocab_size=9).refit(Student())  # type: ignore[arg-type]
    woken = [*ROOM, "wake ['weights']"]
    assert events == [*woken, *ROOM, "restart", *woken, "refit", *ROOM, "wake ['kv_cache']"]


def test_an_engine_starts_and_starts_again_on_gpus_that_training_has_left(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(vllm_placement, "EngineServer", lambda *args, **settings: Engine(events))
    monkeypatch.setattr(vllm_placement, "_arguments", lambda config, vocab_size, single, share: shares.append(share) or ())
    monkeypatch.setattr(vllm_placement, "engine_gib", lambda *args: 0.0)
    replicas = start_replicas(load_config(["rollout=vllm", "objective=grpo"]), 61, 0.6)
    assert events == [*ROOM, "start", "ready"] and shares == [0.6]
    events.clear()
    replicas.restart([0])
    assert events == [*ROOM, "restart"]


def test_what_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference cycles are collected first: memory that only they hold is still allocated."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_memory.gc, "collect", lambda: done.append("collect"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: done.append("ipc"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("cache"))
    gpu_memory.give_back()
    assert done == ["collect", "ipc", "cache"]


def gather_and_drop() -> tuple[int, int]:
    """On a rank: the buffers that Megatron-Core keeps after a pass with sequence parallelism, before and after they are
    freed."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from megatron.core import parallel_state
    from megatron.core.utils import GlobalMemoryBuffer

    from kdrl_mcore.parallel.mcore import drop_gathering_buffer

    memory = GlobalMemoryBuffer()
    with patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", memory):
        memory.get_tensor((4, 8), torch.float32, "mpu")
        before = len(memory.buffer)
        drop_gathering_buffer()
        return before, len(memory.buffer)


def test_what_activations_were_gathered_into_is_dropped(ranks1: RankPool) -> None:
    assert ranks1.run(gather_and_drop) == [(1, 0)]


@pytest.mark.parametrize(("free", "share"), [(80, 0.85), (40.9, 0.46), (8, 0.05)])
def test_beside_a_model_that_is_only_evaluated_an_engine_takes_what_is_free(
    free: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), 80 * GIB))
    assert free_share() == pytest.approx(share)


@pytest.mark.parametrize(
    ("settings", "rest"),
    [
        ("expandable_segments:True", ""),
        ("expandable_segments:True,max_split_size_mb:512", "max_split_size_mb:512"),
        ("roundup_power2_divisions:[256:1,512:2], expandable_segments:True", "roundup_power2_divisions:[256:1,512:2]"),
    ],
)
def test_an_engine_gets_nothing_of_its_rank_and_no_segments_that_grow(settings: str, rest: str) -> None:
    assert without_expandable_segments(settings) == rest
    rank = {"RANK": "3", "TORCHELASTIC_RUN_ID": "x", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "f", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    kept = {"PATH": "/bin", "NCCL_SOCKET_IFNAME": "ib0"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert engine_environment({**kept, **rank, name: settings}) == kept | ({name: rest} if rest else {})

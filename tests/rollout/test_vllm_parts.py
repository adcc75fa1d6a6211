"""Complete and verified groups are handed out while other responses are still being sampled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.experts import encode
from kdrl_mcore.rollout.vllm.engine import VllmEngine
from kdrl_mcore.types import Prompt, Rollout

RESPONSES = 2
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_response_tokens=50, responses_per_prompt=RESPONSES, key=(1, 0, 7))


@dataclass
class GatedServer:
    """Answers at once, except for prompt 0, whose second response waits for the gate."""

    gate: threading.Event

    async def generate(
        self, http: Any, version: int | None, requests: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        for each in requests:
            if each["id"] == "0.1" and not await asyncio.to_thread(self.gate.wait, 30):
                raise TimeoutError("no part was handed out")
            line = {"id": each["id"], "token_ids": [3, 4], "log_probs": [-1.0] * 2, "finish_reason": "stop"}
            routed = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2) if sampling["experts"] else None
            yield {**line, "versions": [[version, 2]], "experts": None if routed is None else encode(routed)}


@dataclass
class OneReplica:
    servers: list[GatedServer]

    def __len__(self) -> int:
        return 1

    def stop(self) -> None: ...


@dataclass
class AllCorrect:
    seen: list[Rollout] = field(default_factory=list)

    def score(self, rollouts: Sequence[Rollout]) -> None:
        self.seen += rollouts
        for rollout in rollouts:
            rollout.reward, rollout.correct = 1.0, True


class Letters:
    def decode_response(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@dataclass
class Weights:
    parts: Any = None
    version: int = 0


@pytest.fixture
def world_size() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_token_that_the_models_do_not_share_is_an_error(world_size: None) -> None:
    """The server was started for another vocabulary: on a GPU such a token would end the job inside a kernel."""
    gate = threading.Event()
    gate.set()
    config = load_config(["rollout=vllm", "objective=grpo"]).rollout
    engine: Any = VllmEngine(OneReplica([GatedServer(gate)]), config, Letters(), None, vocab_size=4)  # type: ignore[arg-type]
    engine._student, engine._version = Weights(), 0
    with pytest.raises(
        EngineError, match="sampled token id 4, but the models share 4 tokens: start its server with --vocabulary 4"
    ):
        engine.generate([Prompt("p", "", np.array([1, 2, 3]), "")], SAMPLING)
    engine.close()


@pytest.mark.parametrize(("part_tokens", "least"), [(1, 1), (20, 2), (0, 0)])
def test_whole_verified_groups_come_in_parts_of_enough_tokens(part_tokens: int, least: int, world_size: None) -> None:
    gate = threading.Event()
    verifier = AllCorrect()
    config = load_config(["rollout=vllm", "objective=grpo"]).rollout
    engine: Any = VllmEngine(OneReplica([GatedServer(gate)]), config, Letters(), verifier, vocab_size=99)  # type: ignore[arg-type]
    engine._student, engine._version = Weights(), 0
    prompts = [Prompt(f"p{i}", "", np.array([i + 1, 2, 3]), "") for i in range(4)]
    parts: list[dict[int, Rollout]] = []

    def take(part: dict[int, Rollout]) -> None:
        parts.append(part)
        if sum(map(len, parts)) == 3 * RESPONSES or part_tokens == 20:
            gate.set()

    if part_tokens == 0:
        gate.set()
    sampling = replace(SAMPLING, verify=True, part_tokens=part_tokens)
    rollouts = engine.generate(prompts, sampling, take)
    engine.close()

    assert [rollout.prompt_id for rollout in rollouts] == [f"p{i}" for i in range(4) for _ in range(RESPONSES)]
    assert len(verifier.seen) == len(rollouts) and all(rollout.correct for rollout in rollouts)
    assert bool(parts) == (part_tokens > 0)
    for part in parts:
        assert sum(rollout.num_tokens for rollout in part.values()) >= part_tokens
        assert len(part) >= least * RESPONSES and all(rollouts[index] is rollout for index, rollout in part.items())
        groups = {rollout.group_id for rollout in part.values()}
        assert set(part) == {group * RESPONSES + response for group in groups for response in range(RESPONSES)}
    indices = [index for part in parts for index in part]
    assert len(indices) == len(set(indices))


def test_a_response_has_the_experts_of_the_layers_that_have_experts(world_size: None) -> None:
    """vLLM returns a row for every layer; here the second has none."""
    gate = threading.Event()
    gate.set()
    config = load_config(["rollout=vllm", "objective=grpo"]).rollout
    engine: Any = VllmEngine(OneReplica([GatedServer(gate)]), config, Letters(), None, vocab_size=9)  # type: ignore[arg-type]
    mixture = SimpleNamespace(num_layers=3, has_experts=lambda layer: layer != 1, experts=SimpleNamespace(count=24))
    engine._student, engine._version = Weights(SimpleNamespace(architecture=mixture)), 0
    prompt = Prompt("p", "", np.array([1, 2, 3]), "")
    (rollout, _) = engine.generate([prompt], replace(SAMPLING, experts=True))
    expected = np.arange(4 * 3 * 2, dtype=np.uint8).reshape(4, 3, 2)[:, [0, 2]]
    np.testing.assert_array_equal(rollout.experts, expected)
    assert engine.generate([prompt], SAMPLING)[0].experts is None
    engine.close()

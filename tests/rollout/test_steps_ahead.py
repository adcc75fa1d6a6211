"""Sampling steps ahead on servers that change their weights and die while responses are unfinished: a seeded soak without
vLLM."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from kdrl_mcore.config import load_config
from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.rollout.engine import Sampling
from kdrl_mcore.rollout.source import Ahead, SampledRollouts
from kdrl_mcore.rollout.vllm import engine as vllm
from kdrl_mcore.rollout.vllm.client import ServerFailed
from kdrl_mcore.types import Prompt
from tests.support.sources import through_json

PROMPTS = [Prompt(f"p{i}", "q", np.array([i + 1]), "a") for i in range(60)]
STEPS, WANTED, RESPONSES = 15, 4, 2


class MortalServer:
    """A server whose tokens have as log-prob minus the version of the weights that sampled them. Every few responses it dies
    with all its requests, and refuses to work until it is started again."""

    def __init__(self, index: int, random: np.random.Generator, mortality: float = 0.01) -> None:
        self.mortality = mortality
        self.index, self.log, self.version, self._random, self.alive, self.deaths = index, "log", -1, random, True, 0

    async def generate(
        self, http: Any, version: int, requests: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        for each in requests:
            length = 1 + each["seed"] % 12
            log_probs = []
            for _ in range(length):
                await asyncio.sleep(2e-3)
                if self.alive and self._random.random() < self.mortality:
                    self.alive, self.deaths = False, self.deaths + 1
                if not self.alive:
                    raise ServerFailed("killed")
                log_probs.append(-float(self.version))
            spans = [[-int(value), count] for value, count in sorted(Counter(log_probs).items(), reverse=True)]
            ids = [each["seed"] % 90 + 1] * length
            yield {"id": each["id"], "token_ids": ids, "log_probs": log_probs, "finish_reason": "stop", "versions": spans}


class Replicas:
    def __init__(self, servers: list[MortalServer]) -> None:
        self.servers = servers

    def __len__(self) -> int:
        return len(self.servers)

    def own(self, indices: Sequence[int]) -> list[MortalServer]:
        return [self.servers[index] for index in indices]

    def failures(self, action: Any, indices: Sequence[int]) -> dict[int, str]:
        return {index: "dead" for index in indices if not self.servers[index].alive}

    def restart(self, indices: Sequence[int]) -> dict[int, str]:
        for index in indices:
            self.servers[index].alive = True
        return {}

    def make_room(self) -> None: ...

    def stop(self) -> None: ...


class Student:
    parts: Any = None
    version = 0

    def wait_for_weights(self) -> None: ...


class Letters:
    def decode_response(self, ids: Sequence[int]) -> str:
        return "".join(chr(97 + i) for i in ids)


@pytest.fixture
def world_size() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("steps_ahead", "max_age", "waits"), [(1, 1, True), (2, 2, False), (3, 7, False)])
def test_prompts_and_versions_survive_killed_servers_and_resumptions(
    steps_ahead: int, max_age: int, waits: bool, world_size: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response follows from its draw: here, where it does not depend on the weights, every prompt gets the responses of a
    synchronous run, however far ahead it is sampled and however often."""

    def send_weights(parts: Any, servers: list[MortalServer], version: int, *_: Any, **__: Any) -> Any:
        for server in servers:
            server.version = version if server.alive else server.version
        raise vllm.RefitError("as if a server did not answer")  # the check afterwards decides

    monkeypatch.setattr(vllm, "send_weights", send_weights)
    random, student = np.random.default_rng(steps_ahead), Student()
    servers = [MortalServer(index, random) for index in range(2)]
    config = load_config(
        [
            "rollout=vllm",
            "objective=grpo",
            "rollout.vllm.placement=server",
            "rollout.max_sequences=3",
            "rollout.vllm.restarts=50",
        ]
    ).rollout

    def make(servers: list[MortalServer], *, synchronous: bool = False) -> Any:
        engine: Any = vllm.VllmEngine(Replicas(servers), config, Letters(), None, vocab_size=99)  # type: ignore[arg-type]
        ahead = None if synchronous else Ahead(engine, steps_ahead, max_age, waits, STEPS, 1)
        sampling = Sampling(1.0, 1.0, 12, RESPONSES, (5, 0))
        return SampledRollouts(engine, student, PromptStream(PROMPTS, WANTED, 0, shuffle=False), None, sampling, ahead=ahead)

    answers = Counter[tuple[str, tuple[int, ...]]]()
    source, trained, changed = make(servers), Counter[str](), 0
    for step in range(1, STEPS + 1):
        if step in (5, 11):  # a stop with a checkpoint, and one after an engine was given up
            if step == 5:
                source.finish()
            state = through_json(source.state_dict())
            source.engine.close()
            source = make(servers)
            source.load_state_dict(state)
        source.refit()
        rollouts = source.rollouts(step)
        for rollout in rollouts:
            versions = [version for version, count in rollout.versions for _ in range(count)]
            assert (-rollout.sampler_log_probs).tolist() == versions
            assert student.version - max_age <= min(versions) and max(versions) <= student.version
            changed += bool(rollout.later_versions)
        assert {len(set(r.response_token_ids)) for r in rollouts} == {1}
        trained.update(rollout.prompt_id for rollout in rollouts)
        answers.update((rollout.prompt_id, tuple(rollout.response_token_ids)) for rollout in rollouts)
        student.version += 1
    assert trained == dict.fromkeys((prompt.prompt_id for prompt in PROMPTS), RESPONSES)
    assert source.ledger.counts()["prompts_waiting"] == 0 and source.engine._work is None
    assert sum(server.deaths for server in servers) > 5 and (changed > 0) is not waits
    source.engine.close()
    synchronous = make([MortalServer(0, random, mortality=0.0)], synchronous=True)
    for step in range(1, STEPS + 1):
        synchronous.refit()
        answers.subtract((each.prompt_id, tuple(each.response_token_ids)) for each in synchronous.rollouts(step))
    assert not any(answers.values())
    synchronous.engine.close()

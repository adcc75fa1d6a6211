"""A server with real vLLM, started by hand on an exported checkpoint: what it samples, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_mcore.convert.convert import export_hf_folder, import_hf
from kdrl_mcore.data.tokenizers import load_tokenizer
from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.vllm.client import TOKEN_VARIABLE, EngineServer, ServerFailed, address_path
from tests.reference import dense
from tests.reference.output_head import in_support
from tests.reference.tiny_models import write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import Outcome, metrics_of, train_on_rank
from tests.support.vllm_models import QUIET_ENGINE, make_prompts, make_student, needs_vllm
from tests.support.zoo import TOKENS

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

STOPS = [0, 7]  # generation_config.json names a second end of sequence
LIMIT = 24
MAX_MODEL_LEN = 48
PROMPTS = [[5], [9, 8, 10, 11, 12, 13], [20, 21, 22], [33, 1], [40, 41, 42, 43, 44]]
PLAIN = {"temperature": 1.0, "top_p": 1.0, "max_tokens": LIMIT}


@dataclass
class Served:
    """A running server, the model it was started with, and the process with which it must end."""

    server: EngineServer
    model: Path
    process: subprocess.Popen[bytes]
    parent: subprocess.Popen[bytes]

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], version: int | None = None, **sampling: Any
    ) -> list[dict[str, Any]]:
        """The responses, in the order of the prompts."""
        requests = [
            {"id": str(number), "prompt_token_ids": list(prompt), "seed": seed}
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

        async def run() -> list[dict[str, Any]]:
            async with httpx.AsyncClient(trust_env=False) as http:
                return [line async for line in self.server.generate(http, version, requests, {**PLAIN, **sampling})]

        return sorted(asyncio.run(run()), key=lambda line: int(line["id"]))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    source = make_student(folder / "source")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    import_hf(source, folder / "megatron", None, lambda total: lambda num_bytes: None)
    export_hf_folder(folder / "megatron", folder / "hf", lambda total: lambda num_bytes: None)
    environment = {**os.environ, **QUIET_ENGINE}
    environment.pop(TOKEN_VARIABLE, None)  # the server makes a token
    parent = subprocess.Popen(["sleep", "900"])
    options = {
        "run-dir": folder,
        "index": 0,
        "model": folder / "hf",
        "parent": parent.pid,
        "max-model-len": MAX_MODEL_LEN,
        "kv-cache-gib": 0.1,
        "extra": "block_size=64",
    }
    command = [sys.executable, "-m", "kdrl_mcore.rollout.vllm.server"]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    server = EngineServer(0, folder, startup_timeout=400)
    try:
        server.wait_until_ready()
        yield Served(server, folder / "hf", process, parent)
    finally:
        parent.kill()
        parent.wait()
        process.wait(120)


@pytest.fixture(scope="module")
def model(served: Served) -> Any:
    return dense.load_model(served.model)


@pytest.mark.parametrize(
    "support", [(0.9, 12, 0.02), (0.6, 0, 0.0), (1.0, 0, 0.3), (0.7, 0, 0.3)], ids=["all", "top-p", "min-p", "min-p, top-p"]
)
def test_log_probs_are_those_of_the_truncated_distribution_that_is_trained(
    support: tuple[float, int, float], served: Served, model: Any
) -> None:
    """vLLM's order is the reference's, and so that of the trainer and of the embedded engine."""
    how = {"temperature": 1.2, **dict(zip(("top_p", "top_k", "min_p"), support, strict=True))}
    for prompt, line in zip(PROMPTS, served.generate(PROMPTS, range(len(PROMPTS)), **how), strict=True):
        row = {"prompt_token_ids": prompt, "response_token_ids": line["token_ids"]}
        with torch.no_grad():
            logits_TV = dense.response_logits(model, row, TOKENS, how["temperature"])
        log_p_TV = logits_TV.masked_fill(~in_support(logits_TV, *support), -torch.inf).log_softmax(-1)
        assert line["log_probs"] == pytest.approx(dense.log_prob_of(log_p_TV, row).tolist(), abs=2e-4)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(served: Served) -> None:
    """Also one that begins in the part of a response that was sampled earlier. The response is longer than the interval at
    which vLLM reports, so that it is aborted."""
    fast, prompts = load_tokenizer(served.model).fast, PROMPTS * 3
    whole = served.generate(prompts, range(len(prompts)), max_tokens=40)
    texts = [fast.decode(line["token_ids"], skip_special_tokens=False) for line in whole]
    longest = max(range(len(texts)), key=lambda number: len(texts[number]))
    stops = [texts[longest][3:5], texts[longest][10]]
    cut = served.generate(prompts, range(len(prompts)), max_tokens=40, stop=stops)
    for line, plain, text in zip(cut, whole, texts, strict=True):
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        count = min([len(plain["token_ids"]), *ends])
        assert line["token_ids"] == plain["token_ids"][:count] and len(line["log_probs"]) == count
        assert line["versions"] == [[None, count]]
        assert line["finish_reason"] == ("stop" if ends else plain["finish_reason"])
    assert len(texts[longest]) > 33  # the first token and `adapter.STREAM_INTERVAL` more
    (first,) = served.generate([PROMPTS[2]], [5], temperature=0.0)
    begun = fast.decode(PROMPTS[2][-1:])  # as if the prompt's last token were a response's first
    pair = begun + fast.decode(first["token_ids"][:1])
    request = {"id": "0", "prompt_token_ids": PROMPTS[2], "seed": 5}

    async def ends_after(begun: int) -> int:
        settings = {**PLAIN, "temperature": 0.0, "stop": [pair]}
        async with httpx.AsyncClient(trust_env=False) as http:
            lines = [line async for line in served.server.generate(http, None, [{**request, "begun": begun}], settings)]
        return len(lines[0]["token_ids"])

    assert asyncio.run(ends_after(1)) == 1 < asyncio.run(ends_after(0))


def test_greedy_tokens_of_an_exported_checkpoint_are_those_of_transformers(served: Served) -> None:
    reference = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    beyond = list(range(TOKENS, reference.config.vocab_size))  # columns without a token
    for prompt, line in zip(PROMPTS, served.generate(PROMPTS, range(len(PROMPTS)), temperature=0.0), strict=True):
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LIMIT,
            eos_token_id=STOPS,
            pad_token_id=0,
            suppress_tokens=beyond,
        )
        assert line["token_ids"] == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_the_distribution_that_is_sampled_from(temperature: float, served: Served, model: Any) -> None:
    for prompt, line in zip(PROMPTS, served.generate(PROMPTS, [3] * len(PROMPTS), temperature=temperature), strict=True):
        row = {"prompt_token_ids": prompt, "response_token_ids": line["token_ids"]}
        with torch.no_grad():
            log_p = dense.response_logits(model, row, TOKENS, temperature).log_softmax(-1)
        np.testing.assert_allclose(line["log_probs"], dense.log_prob_of(log_p, row), atol=1e-3)


def test_more_prompt_tokens_than_one_step_of_vllm_takes(served: Served, model: Any) -> None:
    """vLLM cannot cut a seeded request's prompt in two on CPU: such prompts wait for the next step."""
    prompts = [[1 + (7 * index + step * step) % (TOKENS - 1) for step in range(MAX_MODEL_LEN - 4)] for index in range(128)]
    lines = served.generate(prompts, range(128), max_tokens=4)
    assert len(lines) == 128
    for prompt, line in list(zip(prompts, lines, strict=True))[::9]:
        row = {"prompt_token_ids": prompt, "response_token_ids": line["token_ids"]}
        with torch.no_grad():
            log_p = dense.response_logits(model, row, TOKENS, 1.0).log_softmax(-1)
        np.testing.assert_allclose(line["log_probs"], dense.log_prob_of(log_p, row), atol=1e-3)


def test_responses_stop_at_either_end_of_sequence_or_at_the_limit(served: Served) -> None:
    lines = served.generate([PROMPTS[0]] * 96, range(96))
    ended = [line for line in lines if line["finish_reason"] == "stop"]
    assert {line["token_ids"][-1] for line in ended} == set(STOPS)
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    for line in lines:
        *before, last = line["token_ids"]
        assert not set(before) & set(STOPS) and max(line["token_ids"]) < TOKENS
        assert len(line["log_probs"]) == len(line["token_ids"])
        assert line["finish_reason"] == "stop" or (last not in STOPS and len(line["token_ids"]) == LIMIT)
    assert any(len(line["token_ids"]) == 1 for line in ended)  # an empty response is only its end of sequence


def test_a_seed_gives_the_same_draw_in_any_company(served: Served) -> None:
    together = served.generate([PROMPTS[1]] * 8, range(8))
    alone = served.generate([PROMPTS[1]] * 3, [6, 2, 4])
    assert [line["token_ids"] for line in alone] == [together[seed]["token_ids"] for seed in (6, 2, 4)]
    assert len({tuple(line["token_ids"]) for line in together}) == 8


def test_a_token_is_asked_for_on_every_route(served: Served) -> None:
    server = served.server
    path = address_path(server.run_dir, 0)
    assert path.stat().st_mode & 0o777 == 0o600 and len(json.loads(path.read_text())["token"]) >= 32
    with httpx.Client(base_url=f"http://{server.address}", trust_env=False) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": str(server.token)}):
            assert http.get("/health", headers=headers).status_code == 401
            for route in ("generate", "weights", "sleep", "wake", "stop", "nothing"):
                assert http.post(f"/{route}", json={}, headers=headers).status_code == 401
    with pytest.raises(EngineError, match=TOKEN_VARIABLE):
        EngineServer(0, server.run_dir, address=server.address, token="wrong").health()


@pytest.mark.parametrize("length", [0, MAX_MODEL_LEN - LIMIT + 1])
def test_a_prompt_that_leaves_no_room_is_refused_by_name(length: int, served: Served) -> None:
    with pytest.raises(EngineError, match=f"request 1: a prompt of {length} tokens"):
        served.generate([[5], [5] * length], [0, 0])
    assert served.generate([[5] * (MAX_MODEL_LEN - LIMIT)], [0])[0]["token_ids"]


def test_weights_of_another_version_are_refused(served: Served) -> None:
    with pytest.raises(EngineError, match="asked for weight version 4"):
        served.generate([[5]], [0], version=4)


def test_on_cpu_nothing_sleeps(served: Served) -> None:
    assert served.server.sleep() is False
    served.server.wake(["weights", "kv_cache"])
    assert served.server.health() == {"version": None, "usable": True}


def train_with_servers_on_rank(overrides: Sequence[str], environment: Mapping[str, str]) -> Outcome:
    os.environ.update(environment)
    return train_on_rank(overrides)


def trained(served: Served, ranks1: RankPool, tmp_path: Path, *more: str) -> list[dict[str, float]]:
    """The metrics of three steps that use the running server."""
    run = tmp_path / "run"
    overrides = [
        "rollout=vllm",
        "rollout.vllm.placement=server",
        f"rollout.vllm.servers=[{served.server.address}]",
        f"student.path={served.model}",
        f"teacher.path={make_teacher(tmp_path / 'teacher')}",
        f"data.train={make_prompts(tmp_path / 'train.jsonl')}",
        "data.template=plain",
        f"run.dir={run}",
        "trainer.steps=3",
        "optimizer.lr=1e-2",
        "rollout.prompts_per_step=4",
        "rollout.responses_per_prompt=2",
        f"rollout.max_response_tokens={LIMIT}",
        "logging.progress=false",
        "logging.tensorboard=false",
        "checkpoint.every=-1",
        *more,
    ]
    token = {TOKEN_VARIABLE: str(served.server.token)}
    (outcome,) = ranks1.run(train_with_servers_on_rank, overrides, token, timeout=300)
    assert outcome.code == 0, outcome.stderr
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    return rows


def test_a_job_uses_servers_given_by_address(served: Served, ranks1: RankPool, tmp_path: Path) -> None:
    """Each step's weights are sent to the server; trainer and sampler agree after every step."""
    rows = trained(served, ranks1, tmp_path, "objective=kd_rkl")
    assert all(row["grad_norm"] > 0 and row["drift_max"] < 1e-3 for row in rows)
    assert served.server.health() == {"version": 2, "usable": True}  # the weights that sampled step 3
    with pytest.raises(EngineError, match="the engine has 2"):
        served.generate([[5]], [0], version=1)


def test_half_of_a_batch_may_be_given_and_the_other_sampled(served: Served, ranks1: RankPool, tmp_path: Path) -> None:
    """GKD: given responses have no sampler, so neither drift nor the sampler correction is measured on them."""
    rows = [{"prompt": f"{a}+{a % 7}=", "answer": str(a), "response": f"{a}{a % 7}" * 2} for a in range(10, 30)]
    write_jsonl(tmp_path / "answered.jsonl", rows)
    metrics = trained(served, ranks1, tmp_path, "objective=gkd", f"data.train={tmp_path / 'answered.jsonl'}")
    for row in metrics:
        assert row["given_responses"] == 8 and row["samples"] == 16  # in addition to 4 prompts with 2 responses each
        assert row["grad_norm"] > 0 and row["drift_max"] < 1e-3 and row["kl_full"] > 0


def make_teacher(path: Path) -> Path:
    """Another random model with the same tokens."""
    make_student(path, seed=2)
    return path


def test_a_server_ends_with_its_parent_and_leaves_nothing(served: Served) -> None:
    """This test ends the server, so it must be the last one."""
    family = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]
    assert len(family) > 1
    served.parent.kill()
    served.parent.wait()
    deadline = time.monotonic() + 120
    while any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with pytest.raises(ServerFailed):
        served.server.health()

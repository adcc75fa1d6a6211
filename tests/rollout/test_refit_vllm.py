"""Real vLLM samples with the student's weights: after every refit, while they change, and steps ahead of training."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.reference import dense
from tests.reference.tiny_models import make_qwen2, make_tokenizer, read_jsonl
from tests.support import vllm_runs
from tests.support.late_weights import OVERLAPPED
from tests.support.ranks import RankPool
from tests.support.refit_ranks import VICTIM
from tests.support.training import metrics_of
from tests.support.zoo import TOKENS

pytest.importorskip("vllm")

from kdrl_mcore.rollout.vllm.client import EngineServer, Launch, connections

TOKEN = "of-the-tests"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm_refit")
    vllm_runs.make_pair(folder)
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[EngineServer]:
    """One engine of two workers, for all runs."""
    sizes = ("--max-model-len", "64", "--kv-cache-gib", "0.1", "--max-sequences", "32", "--tensor", "2")
    launch = Launch(("--model", str(models / "student"), *sizes), {"OMP_NUM_THREADS": "1"})
    engine = EngineServer(0, models, token=TOKEN, launch=launch)
    engine.start()
    engine.wait_until_ready()
    yield engine
    engine.stop()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2", reason="vLLM's workers share memory only on CPUs with AVX-512"
)
def test_the_memory_that_workers_share_has_no_name(server: EngineServer) -> None:
    """So that no shared memory is left when they are killed."""
    workers = psutil.Process(server.pid).children(recursive=True)
    shared = {Path(mapped.path) for worker in workers for mapped in worker.memory_maps() if "cpushm" in mapped.path}
    assert len(shared) == 2 and not [path for path in shared if path.exists()]


def train(ranks: RankPool, models: Path, run: Path, server: EngineServer, *more: str) -> None:
    outcomes = ranks.run(vllm_runs.train, TOKEN, vllm_runs.overrides(models, run, str(server.address), *more), timeout=240)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr + outcomes[1].stderr


def rollouts_of(run: Path) -> list[list[dict[str, Any]]]:
    """The lines of each step's rollout file."""
    return [[json.loads(line) for line in file.open()] for file in sorted((run / "rollouts").glob("step_*.jsonl"))]


def test_sampler_and_trainer_agree_after_every_refit(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """The weights do change: a sampler that kept its first weights would show drift."""
    in_parts = ("teacher.score_while_sampling=true", "batch.micro_tokens=32", "rollout.max_sequences=8")
    train(ranks2, models, tmp_path, server, *in_parts)
    metrics = metrics_of(tmp_path)
    assert any(row["teacher_tokens_early"] > 0 for row in metrics)
    assert all("teacher_log_probs" in line for step in rollouts_of(tmp_path) for line in step)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["drift_max"] < 1e-3 for row in metrics), [row["drift_max"] for row in metrics]
    assert [[line["weight_version"] for line in step] for step in rollouts_of(tmp_path)] == [[n] * 16 for n in range(4)]
    assert metrics[0]["grad_norm"] > 0


def test_a_refit_waits_for_weights_that_are_still_being_gathered(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    overlapped = ("parallel.tensor=1", *OVERLAPPED.split(), "trainer.steps=2")
    overrides = vllm_runs.overrides(models, tmp_path, str(server.address), *overlapped)
    outcomes = ranks2.run(vllm_runs.train_with_late_weights, TOKEN, overrides, timeout=240)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert all(outcome.found["gathered"] > 0 for outcome in outcomes)
    assert [row["drift_max"] < 1e-3 for row in metrics_of(tmp_path)] == [True, True]


def test_a_refit_that_breaks_off_leaves_no_trace_in_the_next(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """By then vLLM has loaded half of a layer. The weights go through shared memory, in several buckets."""
    told = ranks2.run(vllm_runs.broken_refit, TOKEN, str(models / "student"), str(tmp_path), server.address)
    assert all(f"tensor {VICTIM} is missing" in text for text in told)
    assert server.health()["usable"] is False
    train(ranks2, models, tmp_path, server, "trainer.steps=1")
    assert metrics_of(tmp_path)[0]["drift_max"] < 1e-3


def test_one_step_ahead_and_its_resumption_lose_and_double_nothing(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    ahead = ("rollout.steps_ahead=1", "trainer.self_test=false")
    train(ranks2, models, tmp_path / "whole", server, *ahead)
    whole = rollouts_of(tmp_path / "whole")
    assert [{line["weight_version"] for line in step} for step in whole] == [{0}, {0}, {1}, {2}]
    drift = [row["drift_max"] for row in metrics_of(tmp_path / "whole")]
    assert drift[0] < 1e-3 < min(drift[1:])  # one step off-policy, which the drift shows

    resumable = (*ahead, "checkpoint.every=2", "checkpoint.asynchronous=false")
    train(ranks2, models, tmp_path / "parts", server, *resumable, "trainer.steps=3")
    checkpoint = tmp_path / "parts" / "checkpoints" / "step_000002"
    waiting = json.loads((checkpoint / "trainer_state.json").read_text())["ledger"]["waiting"]
    train(ranks2, models, tmp_path / "parts", server, *resumable, f"checkpoint.resume={checkpoint}")
    parts = rollouts_of(tmp_path / "parts")

    def places(step: list[dict[str, Any]]) -> list[tuple[str, int, int]]:
        return [(line["prompt_id"], line["group_id"], line["weight_version"]) for line in step]

    assert list(map(places, parts)) == list(map(places, whole))
    assert [line["response_token_ids"] for line in parts[2]] == [
        line["response_token_ids"] for entry in waiting for line in entry["responses"]
    ]


@pytest.fixture(scope="module")
def two_models(models: Path) -> tuple[Path, Path]:
    """Models of the server's shape with other weights."""
    for name, seed in (("seven", 7), ("eight", 8)):
        make_qwen2(models / name, seed=seed, hidden_size=128, **vllm_runs.SHAPE)
        make_tokenizer(models / name)
    return models / "seven", models / "eight"


@pytest.mark.parametrize("unfinished", ["keep", "recompute"])
def test_weights_change_while_responses_are_unfinished(
    unfinished: str, server: EngineServer, two_models: tuple[Path, Path], ranks2: RankPool
) -> None:
    """Every token comes from the version that it names: its log-prob is that of these weights and not of the others. A response
    begun with the new weights has not used the prompt cache of the old ones, which had computed the same prompts."""
    before, after = two_models

    def refit(model: Path, version: int) -> None:
        ranks2.run(vllm_runs.refit, TOKEN, str(model), str(server.run_dir), server.address, version, unfinished, timeout=120)

    refit(before, 7)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, number % 4 + 30] for number in range(800)]
    requests = [{"id": f"{n}.0", "prompt_token_ids": prompt, "seed": n} for n, prompt in enumerate(prompts)]
    lines: list[dict[str, Any]] = []

    async def generate() -> None:
        settings = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 40}
        async with connections() as http:
            async for line in server.generate(http, 7, requests, settings):
                lines.append(line)

    thread = threading.Thread(target=asyncio.run, args=(generate(),))
    thread.start()
    while len(lines) < 10 and thread.is_alive():
        time.sleep(0.01)
    refit(after, 8)
    thread.join(200)
    assert len(lines) == len(requests) and server.health() == {"version": 8, "usable": True}
    kinds = Counter(tuple(version for version, _ in line["versions"]) for line in lines)
    assert set(kinds) == {(7,), (7, 8), (8,)}, kinds
    assert {line["id"] for line in lines} == {each["id"] for each in requests}

    weights = {version: dense.load_model(model) for version, model in ((7, before), (8, after))}
    chosen = [line for kind in kinds for line in [each for each in lines if {v for v, _ in each["versions"]} == {*kind}][:12]]
    for line in chosen:
        assert sum(count for _, count in line["versions"]) == len(line["token_ids"]) == len(line["log_probs"])
        row = {"prompt_token_ids": prompts[int(line["id"].split(".")[0])], "response_token_ids": line["token_ids"]}
        with torch.no_grad():
            log_p = {
                v: dense.log_prob_of(dense.response_logits(w, row, TOKENS, 1.0).log_softmax(-1), row)
                for v, w in weights.items()
            }
        start = 0
        for number, (version, count) in enumerate(line["versions"]):
            span = slice(start, start + count)
            start += count
            off = {v: (torch.tensor(line["log_probs"])[span] - log_p[v][span]).abs().max() for v in weights}
            if number == 0 or unfinished == "recompute":
                assert off[version] < 1e-3, (line["versions"], off)
            if count > 5:
                assert off[15 - version] > 1e-2, (line["versions"], off)


@pytest.mark.parametrize("unfinished", ["keep", "recompute"])
def test_steps_ahead_with_weights_in_flight_lose_and_double_nothing(
    unfinished: str, server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    ahead = ("rollout.steps_ahead=2", "rollout.max_age=4", f"rollout.unfinished={unfinished}", "trainer.self_test=false")
    sizes = ("rollout.max_response_tokens=44", "rollout.max_sequences=8", "trainer.steps=6", "data.shuffle=false")
    train(ranks2, models, tmp_path, server, *ahead, *sizes, f"data.eval={models / 'prompts.jsonl'}", "eval.every=3")
    steps, rows = rollouts_of(tmp_path), metrics_of(tmp_path)
    assert Counter(line["prompt_id"] for step in steps for line in step) == {f"prompts-{i + 1}": 4 for i in range(24)}
    changed = [line for step in steps for line in step if "later_versions" in line]
    assert changed, "no response continued with new weights"
    for number, (step, row) in enumerate(zip(steps, rows, strict=True)):
        for line in step:
            versions = [line["weight_version"], *(version for version, _ in line.get("later_versions", []))]
            assert versions == sorted(set(versions)) and number - 4 <= versions[0] and versions[-1] <= number
        assert row["token_age_max"] == number - min(line["weight_version"] for line in step)
    assert rows[-1]["prompts_trained"] == 24 and rows[-1]["prompts_waiting"] == rows[-1]["prompts_dropped"] == 0
    assert all("eval/accuracy" in row for row in (rows[2], rows[5]))


def test_partial_rollouts_go_on_under_the_next_weights(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """A dense model with the weights of a response's versions gives its tokens the log-probs that vLLM reported."""
    ahead = ("rollout.steps_ahead=1", "rollout.max_age=3", "rollout.partial_tokens=9", "rollout.max_continuations=2")
    sizes = (
        "rollout.max_response_tokens=44",
        "trainer.steps=5",
        "data.shuffle=false",
        "optimizer.lr=0",
        "trainer.self_test=false",
    )
    train(ranks2, models, tmp_path, server, *ahead, *sizes)
    steps, rows = rollouts_of(tmp_path), metrics_of(tmp_path)
    assert Counter(line["prompt_id"] for step in steps for line in step) == {f"prompts-{i + 1}": 4 for i in range(20)}
    lines = [line for step in steps for line in step]
    for line in lines:
        assert line.get("continuations", 0) == min(2, (len(line["response_token_ids"]) - 1) // 9)
        assert line["finish_reason"] == ("stop" if line["response_token_ids"][-1] == 0 else "length")
    assert sum("later_versions" in line for line in lines) > 5
    assert all(row["drift_max"] < 1e-3 for row in rows), "with lr 0 the weights of all versions must be the same"
    assert rows[-1]["prompts_trained"] == 20 and rows[-1]["responses_unfinished"] == 0


def test_the_tool_evaluates_with_vllm_as_with_the_embedded_engine(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """And it samples only the prompts that an interruption left out."""
    files = ["--model", str(models / "student"), "--data", str(models / "prompts.jsonl")]
    sizes = ["--samples", "2", "--block", "16", "--max-response-tokens", "24", "data.template=plain", "reward=exact_match"]
    engines = {
        "embedded": ["--tensor-parallel", "2"],
        "vllm": ["rollout=vllm", "rollout.vllm.placement=server", f'rollout.vllm.servers=["{server.address}"]'],
    }

    def evaluate(engine: str) -> dict[str, float]:
        arguments = [*files, *sizes, "--output", str(tmp_path / engine), *engines[engine]]
        outcomes = ranks2.run(vllm_runs.evaluate, TOKEN, arguments, timeout=240)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        return json.loads((tmp_path / engine / "metrics.json").read_text())

    def kept(engine: str) -> dict[str, list[dict[str, Any]]]:
        return {file.name: read_jsonl(file) for file in sorted((tmp_path / engine / "prompts").iterdir())}

    metrics, responses = evaluate("vllm"), kept("vllm")
    embedded = evaluate("embedded")
    assert metrics.keys() == embedded.keys()
    assert (
        responses.keys()
        == kept("embedded").keys()
        == {f"{mode}_00000{n}.jsonl" for mode in ("greedy", "sampled") for n in (1, 2)}
    )
    for name, rows in kept("embedded").items():
        assert [row.keys() for row in responses[name]] == [row.keys() for row in rows]
        if name.startswith("greedy"):
            assert [row["response_token_ids"] for row in responses[name]] == [row["response_token_ids"] for row in rows]

    (tmp_path / "vllm" / "prompts" / "sampled_000002.jsonl").unlink()
    others = {file: file.stat().st_mtime_ns for file in (tmp_path / "vllm" / "prompts").iterdir()}
    assert evaluate("vllm") == metrics and kept("vllm") == responses
    assert {file: file.stat().st_mtime_ns for file in others} == others

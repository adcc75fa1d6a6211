"""Real vLLM samples with the student's weights: after every refit, and one step ahead of training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.reference.tiny_models import read_jsonl
from tests.support import vllm_runs
from tests.support.late_weights import OVERLAPPED
from tests.support.ranks import RankPool
from tests.support.refit_ranks import VICTIM
from tests.support.training import metrics_of

pytest.importorskip("vllm")

from kdrl_mcore.rollout.vllm.client import EngineServer, Launch

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
    """So that none is left when they are killed."""
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
    """And the weights did move: the drift of a sampler that kept its first weights would be seen."""
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
    """vLLM has loaded half of a layer by then. Through memory, in several buckets."""
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
    assert drift[0] < 1e-3 < min(drift[1:])  # one step off-policy, and it shows

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


def test_the_tool_evaluates_with_vllm_as_with_the_embedded_engine(
    server: EngineServer, models: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    """And samples only what an interruption has left out."""
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

"""vLLM loads the adapters that a run exports or that a refit sends, and samples as `peft` computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("vllm")

from kdrl_mcore.cli import convert
from kdrl_mcore.rollout.vllm.client import EngineServer, Launch
from tests.reference import adapters, dense
from tests.reference.tiny_models import make_qwen2, make_rollouts, make_tokenizer, read_jsonl, write_jsonl
from tests.support import ROOT, vllm_runs
from tests.support.lora import ALPHA, RANK, adapt
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.vllm_lora import PROMPT
from tests.support.zoo import TOKENS


@pytest.mark.timeout(600)
def test_vllm_loads_what_a_run_exports(ranks2: RankPool, tmp_path: Path) -> None:
    student = make_qwen2(tmp_path / "student", seed=5, hidden_size=128, num_layers=2)
    make_tokenizer(student)
    rollouts = write_jsonl(tmp_path / "rollouts.jsonl", make_rollouts(student, seed=13, vocab_size=61))
    adapted = adapt(tmp_path / "adapter", student, None, rollouts)
    words = [*adapted.overrides, "objective.beta.init=1", "optimizer.lr=0.01", "trainer.steps=1", "parallel.tensor=2", *FAST]
    outcomes = ranks2.run(train_on_rank, [f"run.dir={tmp_path / 'run'}", *words])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    exported = tmp_path / "run" / "adapter"
    before, after = adapters.read_factors(adapted.adapter), adapters.read_factors(exported)
    assert before.keys() == after.keys() and not any(before[name].equal(after[name]) for name in before)
    settings = json.loads((exported / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (RANK, ALPHA, str(student))
    command = [sys.executable, "-m", "tests.support.vllm_lora", str(student), str(exported), str(RANK)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, found = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = adapters.load_adapted(student, exported)(torch.tensor([[*PROMPT, *tokens]])).logits[0][len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=1e-4, atol=1e-4)
    base = dense.load_model(student)(torch.tensor([[*PROMPT, *tokens]])).logits[0][len(PROMPT) - 1 : -1]
    assert (base - logits).abs().max() > 0.1  # the base model would answer differently


AHEAD = ("rollout.max_response_tokens=44", "rollout.max_sequences=8", "trainer.self_test=false", "rollout.max_age=3")
RUNS = {
    "whole": (),
    "parts": (
        *(
            "batch.updates_per_step=2",
            "rollout.steps_ahead=1",
            "rollout.partial_tokens=9",
            "rollout.max_continuations=2",
            *AHEAD,
        ),
    ),
    "ahead": ("rollout.steps_ahead=1", "rollout.unfinished=recompute", *AHEAD),
}
"""Ways to sample: within a step; in parts, under the adapters of several steps of two updates; ahead, while adapters change."""


@pytest.mark.timeout(900)
def test_a_refit_sends_adapters_alone(ranks2: RankPool, tmp_path: Path) -> None:
    """The engine, of two workers, has the base from its files. Each token has the log-prob that `peft` computes for it with the
    adapters of its version."""
    vllm_runs.make_pair(tmp_path)
    sizes = ("--max-model-len", "64", "--kv-cache-gib", "0.1", "--max-sequences", "32", "--lora-rank", "8", "--tensor", "2")
    launch = Launch(("--model", str(tmp_path / "student"), *sizes), {"OMP_NUM_THREADS": "1"})
    server = EngineServer(0, tmp_path, token="t", launch=launch)
    server.start()
    try:
        server.wait_until_ready()
        assert server.health() == {"version": None, "usable": False}
        lora = ("student.lora.rank=4", "student.lora.alpha=6", "rollout.vllm.refit_adapters=true", "trainer.steps=3")
        for name, more in RUNS.items():
            words = (*lora, "checkpoint.every=1", "checkpoint.keep=3", "optimizer.lr=3e-2", *more)
            outcomes = ranks2.run(
                vllm_runs.train, "t", vllm_runs.overrides(tmp_path, tmp_path / name, str(server.address), *words), timeout=240
            )
            assert [outcome.code for outcome in outcomes] == [0, 0], (name, outcomes[0].stderr, outcomes[0].messages)
    finally:
        server.stop()
    assert [row["drift_max"] < 1e-3 for row in metrics_of(tmp_path / "whole")] == [True] * 3
    for name in RUNS:
        versions = _check_versions(tmp_path / name, tmp_path / "student", updates=2 if name == "parts" else 1)
        assert name != "parts" or all(len(each) > 1 for each in versions)


def _check_versions(run: Path, student: Path, updates: int) -> list[list[int]]:
    """The versions of each response of the last step, all of whose log-probs are right."""
    base = dense.load_model(student)
    models = {0: base}
    for step in (1, 2):
        adapter = run / f"adapter {step}"
        saved = run / "checkpoints" / f"step_{step:06d}"
        assert convert.main(["export", "--checkpoint", str(saved), "--output", str(adapter), "--adapter"]) == 0
        models[step * updates] = adapters.load_adapted(student, adapter)
    moved, found = 0.0, []
    for row in read_jsonl(run / "rollouts" / "step_000003.jsonl"):
        later = row.get("later_versions", [])
        counts = [len(row["response_token_ids"]) - sum(count for _, count in later), *(count for _, count in later)]
        found.append([row["weight_version"], *(version for version, _ in later)])
        with torch.no_grad():
            of = {
                version: dense.log_prob_of(dense.response_logits(models[version], row, TOKENS, 1.0).log_softmax(-1), row)
                for version in {0, *found[-1]}
            }
        wanted = torch.cat([of[version].split(counts)[index] for index, version in enumerate(found[-1])])
        torch.testing.assert_close(torch.tensor(row["sampler_log_probs"]).double(), wanted, rtol=1e-3, atol=1e-3)
        moved = max(moved, float((wanted - of[0]).abs().max()))
    assert moved > 0.05  # the base would answer differently
    return found

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


@pytest.mark.timeout(600)
def test_a_refit_sends_adapters_alone(ranks2: RankPool, tmp_path: Path) -> None:
    """The engine has the base from its files. After two updates it samples as the trainer and `peft` compute."""
    vllm_runs.make_pair(tmp_path)
    run, student = tmp_path / "run", tmp_path / "student"
    sizes = ("--max-model-len", "64", "--kv-cache-gib", "0.1", "--max-sequences", "32", "--lora-rank", "8")
    server = EngineServer(0, tmp_path, token="t", launch=Launch(("--model", str(student), *sizes), {"OMP_NUM_THREADS": "1"}))
    server.start()
    try:
        server.wait_until_ready()
        assert server.health() == {"version": None, "usable": False}
        lora = ("student.lora.rank=4", "student.lora.alpha=6", "rollout.vllm.refit_adapters=true", "trainer.steps=3")
        words = vllm_runs.overrides(tmp_path, run, str(server.address), *lora, "checkpoint.every=2", "optimizer.lr=3e-2")
        outcomes = ranks2.run(vllm_runs.train, "t", words, timeout=240)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    finally:
        server.stop()
    assert [row["drift_max"] < 1e-3 for row in metrics_of(run)] == [True] * 3
    checkpoint, adapter = run / "checkpoints" / "step_000002", tmp_path / "adapter"
    assert convert.main(["export", "--checkpoint", str(checkpoint), "--output", str(adapter), "--adapter"]) == 0
    model, base = adapters.load_adapted(student, adapter), dense.load_model(student)
    moved = 0.0
    for row in read_jsonl(run / "rollouts" / "step_000003.jsonl"):
        assert row["weight_version"] == 2
        with torch.no_grad():
            wanted, before = (
                dense.log_prob_of(dense.response_logits(each, row, TOKENS, 1.0).log_softmax(-1), row) for each in (model, base)
            )
        torch.testing.assert_close(torch.tensor(row["sampler_log_probs"]).double(), wanted, rtol=1e-3, atol=1e-3)
        moved = max(moved, float((wanted - before).abs().max()))
    assert moved > 0.05  # the base would answer differently

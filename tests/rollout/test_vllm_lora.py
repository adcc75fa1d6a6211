"""vLLM loads the adapters that a run exports, and samples as `peft` computes."""

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

from tests.reference import adapters, dense
from tests.reference.tiny_models import make_qwen2, make_rollouts, make_tokenizer, write_jsonl
from tests.support import ROOT
from tests.support.lora import ALPHA, RANK, adapt
from tests.support.ranks import RankPool
from tests.support.training import FAST, train_on_rank
from tests.support.vllm_lora import PROMPT


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

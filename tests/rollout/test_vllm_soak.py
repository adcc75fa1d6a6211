"""Sampling steps ahead with real vLLM, whose engines are killed every few steps at moments drawn from a seed, while responses
continue with new weights: every prompt is trained on once, with the right versions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.reference.tiny_models import read_jsonl
from tests.support import ROOT, vllm_runs
from tests.support.training import metrics_of
from tests.support.vllm_models import QUIET_ENGINE, environment, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(590)]

STEPS, MAX_AGE, RESPONSES = 8, 4, 4


def test_killed_engines_lose_and_double_nothing(tmp_path: Path) -> None:
    vllm_runs.make_pair(tmp_path)
    overrides = [each for each in vllm_runs.overrides(tmp_path, tmp_path / "run", "") if "vllm.servers" not in each]
    overrides += ["parallel.tensor=1", "rollout.vllm.replicas=2", "rollout.vllm.kv_cache_gib=0.1", "rollout.vllm.restarts=9"]
    overrides += ["rollout.steps_ahead=2", f"rollout.max_age={MAX_AGE}", "rollout.unfinished=keep", "rollout.max_sequences=8"]
    overrides += ["rollout.max_response_tokens=120", f"trainer.steps={STEPS}", "trainer.self_test=false", "data.shuffle=false"]
    command = [sys.executable, "-m", "tests.support.mortal_engines", "1", *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment(QUIET_ENGINE), capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("killed engine") == 2 and result.stderr.count("is being restarted") >= 2, result.stderr

    steps = [read_jsonl(tmp_path / "run/rollouts" / f"step_{step:06d}.jsonl") for step in range(1, STEPS + 1)]
    assert Counter(line["prompt_id"] for step in steps for line in step) == {
        f"prompts-{i + 1}": RESPONSES for i in range(4 * STEPS)
    }
    for number, step in enumerate(steps):
        for line in step:
            later = line.get("later_versions", [])
            versions = [line["weight_version"], *(version for version, _ in later)]
            assert versions == sorted(set(versions)) and number - MAX_AGE <= versions[0] and versions[-1] <= number
            assert sum(count for _, count in later) < len(line["response_token_ids"]) == len(line["sampler_log_probs"])
    assert any("later_versions" in line for step in steps for line in step)
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["prompts_trained"] == 4 * STEPS and rows[-1]["prompts_waiting"] == rows[-1]["prompts_dropped"] == 0
    assert all(row["prompts_drawn"] == row["prompts_trained"] + row["prompts_waiting"] for row in rows)

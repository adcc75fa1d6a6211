"""SmolLM2-135M-Instruct, a real language model, in all parts of a run: sampling, scoring, layouts, resuming, vLLM.

`make test-real` takes some minutes on 2 quiet cores and 10 GB of memory. Runs are as short as possible: two prompts, two
responses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_mcore.data.tokenizers import load_tokenizer
from tests.reference import dense
from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.support import ROOT
from tests.support.commands import score_on_rank
from tests.support.ranks import RankPool
from tests.support.sampling import LIMIT, SAMPLINGS, assert_close, generate_on_rank
from tests.support.smollm2 import model_folder
from tests.support.training import FAST, metrics_of, steps_of, train_on_rank

PROBLEMS = (
    "Ann has 7 coins, gets 5, loses 3 and gets 8. How many coins does Ann have now?",
    "Ben has 4 cups and gets 9. How many cups does Ben have now?",
    "Max has 5 keys, gets 9 and gets 7. How many keys does Max have now?",
    "Mia has 9 pens and loses 6. How many pens does Mia have now?",
)
ANSWERS = ("17", "13", "21", "3")
WORKED = ("7+5=12\n12-3=9\n9+8=17\n\\boxed{17}", "4+9=13\n\\boxed{13}", "5+9=14\n14+7=21\n\\boxed{21}", "9-6=3\n\\boxed{3}")
SECONDS = 500


@pytest.fixture(scope="module")
def model() -> Path:
    return model_folder()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    columns = zip(PROBLEMS, ANSWERS, WORKED, strict=True)
    write_jsonl(file, [{"prompt": prompt, "answer": answer, "response": worked} for prompt, answer, worked in columns])
    return file


@pytest.fixture(scope="module")
def ranks3() -> Iterator[RankPool]:
    """A world of three ranks: nine heads and three key/value heads can only be split in three."""
    pool = RankPool(3)
    yield pool
    pool.close()


def job(model: Path, data: Path, run: Path, *more: str) -> list[str]:
    """The overrides of a short run."""
    return [
        *("prompt=smollm2", "reward=exact_match", "reward.workers=1", "rollout.prompts_per_step=2"),
        *(f"student.path={model}", f"data.train={data}", f"run.dir={run}", "optimizer.lr=1e-5", "eval.every=-1"),
        *("rollout.responses_per_prompt=2", "rollout.max_response_tokens=12", "checkpoint.export_hf=false", *FAST, *more),
    ]


def train(pool: RankPool, overrides: list[str]) -> None:
    outcomes = pool.run(train_on_rank, overrides, timeout=SECONDS)
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes[0].stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tensor", [1, 3])
def test_the_embedded_engine_says_what_transformers_says(
    tensor: int, model: Path, data: Path, ranks1: RankPool, ranks3: RankPool, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model)
    prompts = [ids.tolist() for ids in tokenizer.encode(PROBLEMS, special_tokens=False)]
    overrides = job(model, data, tmp_path, "objective=grpo", f"parallel.tensor={tensor}")
    pool = {1: ranks1, 3: ranks3}[tensor]
    found = pool.run(
        generate_on_rank, overrides, prompts, {name: SAMPLINGS[name] for name in ("greedy", "plain")}, timeout=SECONDS
    )
    hf: Any = dense.load_model(model, torch.float32)
    for row in found[0]["greedy"]:
        ids = torch.tensor([row["prompt_token_ids"]])
        asked = {"do_sample": False, "max_new_tokens": LIMIT, "eos_token_id": sorted(tokenizer.eos_ids), "pad_token_id": 0}
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        assert row["response_token_ids"] == out[0, ids.shape[1] :].tolist()
    for row in found[0]["plain"]:
        assert_close(row["sampler_log_probs"], row["trainer_log_probs"])


@pytest.mark.timeout(900)
def test_every_layout_takes_the_same_supervised_step(
    model: Path, data: Path, ranks1: RankPool, ranks2: RankPool, ranks3: RankPool, tmp_path: Path
) -> None:
    """Loss, entropy and the norm of the gradient agree to 1e-4."""
    layouts = {
        "alone": (ranks1, []),
        "context 2": (ranks2, ["parallel.context=2"]),
        "pipeline 2": (ranks2, ["parallel.pipeline=2"]),
        "data 2": (ranks2, []),
        "tensor 3, sequence parallel": (ranks3, ["parallel.tensor=3", "parallel.sequence_parallel=true"]),
    }
    found = {}
    for name, (pool, overrides) in layouts.items():
        run = tmp_path / name.replace(", ", "_").replace(" ", "")
        sft = ["objective=sft", "rollout.max_response_tokens=48", "rollout.responses_per_prompt=1", "trainer.steps=1"]
        train(pool, [*job(model, data, run, *sft, "rollout.prompts_per_step=4"), *overrides])
        (row,) = metrics_of(run)
        found[name] = {key: row[key] for key in ("loss", "entropy", "grad_norm")}
    for name, numbers in found.items():
        assert numbers == pytest.approx(found["alone"], rel=1e-4), name


@pytest.mark.timeout(900)
def test_rollouts_score_as_in_transformers(model: Path, data: Path, ranks1: RankPool, tmp_path: Path) -> None:
    train(ranks1, job(model, data, tmp_path / "run", "objective=grpo", "trainer.steps=1"))
    rollouts, scored = tmp_path / "run" / "rollouts" / "step_000001.jsonl", tmp_path / "scored.jsonl"
    (outcome,) = ranks1.run(
        score_on_rank, ["--model", str(model), "--input", str(rollouts), "--output", str(scored)], timeout=SECONDS
    )
    assert outcome.code == 0, outcome.stderr
    hf = dense.load_model(model, torch.float32)
    for row in read_jsonl(scored):
        with torch.no_grad():
            log_p = dense.response_logits(hf, row, 49152, 1.0).log_softmax(-1)
        expected = log_p.gather(1, torch.tensor(row["response_token_ids"])[:, None])[:, 0]
        for name in ("log_probs", "sampler_log_probs"):  # thirty layers round more than two do in other tests
            assert row[name] == pytest.approx(expected.tolist(), abs=1e-4), name


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(model: Path, data: Path, tmp_path: Path) -> None:
    def start(run: Path, *more: str) -> int:
        kdrl = ("objective=kdrl", "objective.beta.init=0.1", f"teacher.path={model}", "trainer.deterministic=true")
        overrides = [
            each for each in job(model, data, run, *kdrl, "trainer.steps=3") if not each.startswith("checkpoint.every")
        ]
        command = [sys.executable, "-m", "kdrl_mcore.train", *overrides, "checkpoint.every=1", "checkpoint.keep=1", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=SECONDS, check=False).returncode

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole) == 0
    assert start(parts, "fault.kind=kill", "fault.step=3", "checkpoint.asynchronous=false") == -9
    assert [row["step"] for row in metrics_of(parts)][-1] == 2
    assert start(parts) == 0
    assert steps_of(parts) == steps_of(whole)


@pytest.mark.timeout(900)
def test_vllm_samples_with_the_students_weights(model: Path, data: Path, ranks1: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    sizes = ("rollout.vllm.kv_cache_gib=0.3", "rollout.max_prompt_tokens=128", "rollout.max_sequences=8")
    train(ranks1, job(model, data, tmp_path, "rollout=vllm", "objective=grpo", "trainer.steps=2", "optimizer.lr=1e-4", *sizes))
    assert all(row["drift_mean"] < 1e-3 for row in metrics_of(tmp_path))  # step 2 samples with the weights of step 1

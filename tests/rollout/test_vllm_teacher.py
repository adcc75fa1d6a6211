"""A teacher that real vLLM serves, started by `kdrl-serve-teacher`: loss and gradient of every parameter agree with the dense
reference under every kind of estimator that it can serve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.reference.tiny_models import make_qwen2, make_rollouts, make_tokenizer, write_jsonl
from tests.support import ROOT
from tests.support.agreement import SETTINGS, Case, check
from tests.support.ranks import RankPool
from tests.support.vllm_models import QUIET_ENGINE, SHAPE, make_student, needs_vllm
from tests.support.zoo import TOKENS, Zoo

pytestmark = [needs_vllm, pytest.mark.timeout(600)]

TOP_K = replace(SETTINGS, estimator="top_k", top_k=7, top_k_support="teacher")
CASES = {
    "k1": replace(SETTINGS, estimator="k1", placement="advantage"),
    "k2": SETTINGS,
    "k3": replace(SETTINGS, estimator="k3"),
    "reverse, bucket": TOP_K,
    "reverse, corrected": replace(TOP_K, top_k_tail="corrected"),
    "forward, truncate": replace(TOP_K, divergence="forward", top_k_tail="truncate"),
    "forward, bucket": replace(TOP_K, divergence="forward"),
    "jsd, renormalize": replace(TOP_K, divergence="jsd", top_k_tail="renormalize"),
    "trust and forward, bucket": replace(TOP_K, divergence="forward", mix="trust"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A student, a teacher without columns beyond the tokenizer, which a server would count, and rollouts."""
    folder = tmp_path_factory.mktemp("served")
    make_student(folder / "untied")
    make_qwen2(folder / "teacher", seed=2, vocab_size=TOKENS, **SHAPE)
    make_tokenizer(folder / "teacher")
    write_jsonl(folder / "uneven.jsonl", make_rollouts(folder / "untied", seed=5, vocab_size=TOKENS, noise=0.2))
    return Zoo(folder)


@pytest.fixture(scope="module")
def run_dir(models: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run directory in which a server writes its address; afterwards none of the server's processes is left."""
    run = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "kdrl_mcore.cli", "serve-teacher", "--model", str(models.model("teacher"))]
    command += ["--run-dir", str(run), "--dtype", "float32", "--max-model-len", "64", "--max-logprobs", "7"]
    command += ["--kv-cache-gib", "0.1", "--max-num-seqs", "16", "--enforce-eager"]
    environment = {**os.environ, **QUIET_ENGINE, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, env=environment)
    children: list[psutil.Process] = []
    try:
        while not (run / "teachers" / "teacher-0.json").exists():
            assert server.poll() is None
            time.sleep(0.1)
        children = psutil.Process(server.pid).children(recursive=True)
        yield run
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert len(children) > 1 and not psutil.wait_procs(children, timeout=20)[1]


@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_a_teacher_in_vllm_agrees_with_the_dense_reference(
    settings: object, models: Zoo, run_dir: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "teachers").mkdir(parents=True)
    (run / "teachers" / "teacher-0.json").write_bytes((run_dir / "teachers" / "teacher-0.json").read_bytes())
    layout = "parallel.tensor=2 teacher.server.kind=completions"
    check(Case(2, layout, settings), models, ranks2, run)  # type: ignore[arg-type]

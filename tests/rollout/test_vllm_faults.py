"""A real torchrun job of tensor-parallel size 2 with two colocated engines, which are killed or hang in every phase."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import ROOT
from tests.support.training import metrics_of
from tests.support.vllm_models import QUIET_ENGINE, environment, make_prompts, make_student, needs_vllm

pytestmark = [needs_vllm, pytest.mark.timeout(900)]

PROMPTS, RESPONSES = 4, 4


@dataclass
class Run:
    """The files and processes that the job left."""

    folder: Path
    code: int
    stderr: str

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        lines = (self.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("faults")
    student, teacher = make_student(folder / "student"), make_student(folder / "teacher", seed=2)
    overrides = [
        "rollout=vllm",
        "rollout.vllm.kv_cache_gib=0.1",
        "rollout.vllm.restarts=1",
        "rollout.vllm.generation_timeout=30",
        "rollout.vllm.refit_timeout=40",
        "rollout.vllm.refit_bucket_mib=1",
        "objective=kd_rkl",
        "reward=exact_match",
        "parallel.tensor=2",
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"data.train={make_prompts(folder / 'train.jsonl')}",
        "data.template=plain",
        f"run.dir={folder / 'run'}",
        "trainer.steps=6",
        "optimizer.lr=1e-2",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.responses_per_prompt={RESPONSES}",
        "rollout.max_response_tokens=200",
        "rollout.max_prompt_tokens=16",
        "logging.progress=false",
        "logging.tensorboard=false",
        "checkpoint.export_hf=false",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.support.faulty_train", *overrides],
        cwd=ROOT,
        env=environment(QUIET_ENGINE),
        capture_output=True,
        text=True,
        timeout=850,
    )
    return Run(folder / "run", result.returncode, result.stderr)


def test_a_killed_engine_is_started_again_in_every_phase(run: Run) -> None:
    for engine, step in ((1, 2), (0, 3), (1, 4)):
        assert f"killed engine {engine} in step {step}\n" in run.stderr, run.stderr
    assert run.stderr.count("is being restarted") == 6  # one of them in vain
    assert [row["step"] for row in metrics_of(run.folder)] == [1, 2, 3, 4]


def test_an_engine_that_hangs_is_found_within_its_time_out(run: Run) -> None:
    for engine, step in ((1, 3), (0, 4)):
        assert f"engine {engine} hangs in step {step}\n" in run.stderr, run.stderr
    # During generation: its server answered, but reported no progress.
    assert re.search(r"engine 1 is being restarted: engine 1 at \S+: no progress within the time-out", run.stderr)
    # During the refit.
    assert re.search(r"refit to version 3 failed on rank 0, at (the end|\S+\.weight): engine 0: it does not answer", run.stderr)


def test_a_restarted_engine_has_the_students_present_weights(run: Run) -> None:
    for row in metrics_of(run.folder):
        assert row["drift_max"] < 1e-3 and row["grad_norm"] > 0
    for step in (1, 2, 3, 4):
        assert {line["weight_version"] for line in run.rollouts(step)} == {step - 1}


def test_no_response_is_lost_doubled_or_made_up(run: Run) -> None:
    for step in (1, 2, 3, 4):
        lines = run.rollouts(step)
        assert [line["group_id"] for line in lines] == [group for group in range(PROMPTS) for _ in range(RESPONSES)]
        assert Counter(line["prompt_id"] for line in lines).most_common(1)[0][1] == RESPONSES
        assert all(line["response_token_ids"] for line in lines)
        assert len({(line["prompt_id"], tuple(line["response_token_ids"])) for line in lines}) > PROMPTS * RESPONSES * 0.7


def test_verification_on_the_way_is_that_of_afterwards(run: Run) -> None:
    for step in (1, 2, 3, 4):
        for line in run.rollouts(step):
            assert line["correct"] is (line["response"].strip() == line["answer"]), line
            assert line["reward"] == float(line["correct"])


def test_an_engine_that_cannot_come_back_ends_the_run_with_one_line_and_a_checkpoint(run: Run) -> None:
    assert run.code != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "vLLM engine 0 failed 2 times and is not started again" in errors[0], run.stderr
    assert "--model /nowhere is not a folder" in errors[0]
    assert (run.folder / "checkpoints" / "latest").resolve().name == "step_000004"


def test_killed_and_hung_engines_leave_no_process_behind(run: Run) -> None:
    assert run.stderr.count("left running: []") == 2
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(run.folder) in (process.info["cmdline"] or [])]

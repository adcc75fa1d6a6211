"""Run directories written by commit 8a4f2ff (version 0.1.0) continue as if this version had trained them from the first step.

`data/runs_of_8a4f2ff.tar.xz` contains two of them after two steps, with their models and data: `kdrl` (one rank) and `sft`
(two tensor-parallel ranks). Their metrics do not depend on the paths from which their files were read.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from tests.reference.tiny_models import read_hf_weights
from tests.support.ranks import RankPool
from tests.support.training import metrics_of, train_on_rank

RUNS = Path(__file__).parent / "data" / "runs_of_8a4f2ff.tar.xz"
SAMPLED = [
    *("objective=kdrl_annealing", "reward=exact_match", "reward.workers=1", "rollout.prompts_per_step=3"),
    *("rollout.responses_per_prompt=2", "rollout.max_response_tokens=8"),
]
RAN = {"kdrl": SAMPLED, "sft": ["objective=sft", "rollout.prompts_per_step=4"]}
"""The overrides with which each run was started, except for its paths."""
COMPARED = ("step", "loss", "grad_norm", "lr", "beta", "kl", "entropy", "reward", "response_length")


@pytest.mark.parametrize(("name", "ranks"), [("kdrl", 2), ("sft", 1)])
def test_it_resumes_in_another_layout_and_equals_a_run_that_this_version_made_alone(
    name: str, ranks: int, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    with tarfile.open(RUNS) as archive:
        archive.extractall(tmp_path, filter="data")
    job = [f"student.path={tmp_path}/student", f"data.train={tmp_path}/train.jsonl", "data.template=plain", *RAN[name]]
    job += ["optimizer.lr=1e-3", "checkpoint.every=1", "trainer.deterministic=true", "trainer.self_test=false"]
    job += ["logging.tensorboard=false", "logging.progress=false", "trainer.steps=4", f"parallel.tensor={ranks}"]
    if name == "kdrl":
        job.append(f"teacher.path={tmp_path}/teacher")
    before = metrics_of(tmp_path / name)
    log = ""
    for run in (tmp_path / name, tmp_path / "anew"):
        outcomes = pools[ranks].run(train_on_rank, [*job, f"run.dir={run}"])
        assert {outcome.code for outcome in outcomes} == {0}, "".join(outcome.stderr for outcome in outcomes)
        log = log or "\n".join(outcomes[0].log)

    assert f"resumed from {tmp_path}/{name}/checkpoints/step_000002 after step 2" in log and "trainer.steps: 2 -> 4" in log
    resumed, anew = metrics_of(tmp_path / name), metrics_of(tmp_path / "anew")
    assert resumed[:2] == before and [row["step"] for row in resumed] == [1, 2, 3, 4]
    for one, other in zip(resumed, anew, strict=True):
        for key in set(COMPARED) & set(other):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (one["step"], key)
    expected = read_hf_weights(tmp_path / "anew" / "hf")
    for key, weight in read_hf_weights(tmp_path / name / "hf").items():
        assert weight.allclose(expected[key], rtol=1e-4, atol=1e-6), key
    assert (tmp_path / name / "left" / "hf_1" / "model.safetensors").is_file()  # that version did not mark its exports

"""SmolLM2-135M-Instruct in a SLURM job on one node: the script of the 32B job, preflight included, with three tensor ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference.tiny_models import write_jsonl
from tests.support import ROOT
from tests.support.slurm_cluster import Cluster, needs_slurm
from tests.support.smollm2 import model_folder
from tests.support.training import metrics_of

pytestmark = [needs_slurm, pytest.mark.timeout(900)]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "slurm")
    cluster.start()
    yield cluster
    cluster.stop()


def test_a_job_of_one_node_distils_it_from_itself(cluster: Cluster, tmp_path: Path) -> None:
    """The model's divergence from itself is zero, whatever is sampled, up to rounding in two steps' tokens."""
    model, data, run = model_folder(), tmp_path / "sums.jsonl", tmp_path / "run"
    write_jsonl(data, [{"prompt": f"Ann has {n} coins and gets 2. How many has she?", "answer": str(n + 2)} for n in range(4)])
    overrides = [
        *(
            "experiment=smollm2",
            "objective=kdrl",
            "objective.kd.estimator=exact",
            f"student.path={model}",
            f"teacher.path={model}",
        ),
        *(f"data.train={data}", "reward=exact_match", "reward.workers=1", "rollout.prompts_per_step=2", "optimizer.lr=0"),
        *("rollout.responses_per_prompt=2", "rollout.max_response_tokens=8", "eval.every=-1", "trainer.steps=2"),
        *("data.eval=null", "eval.benchmarks=[]", "eval.at_start=false", "checkpoint.every=0"),
        *("parallel.tensor=3", "cluster.nodes=1", "cluster.gpus_per_node=3", f"run.dir={run}", "logging.progress=false"),
    ]
    variables = {"KDRL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "slurm" / "kdrl_32b.sh")
    number = cluster.run("sbatch", "--parsable", script, *overrides, cwd=tmp_path, **variables).strip()
    log = tmp_path / f"kdrl_32b-{number}.log"
    assert cluster.end_of(number) == "COMPLETED", log.read_text()
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(abs(row["kl_full"]) < 1e-4 and math.isfinite(row["loss"]) for row in rows)
    assert (run / "hf" / "model.safetensors").is_file() and (run / "checkpoints" / "latest").is_symlink()
    assert "ok    memory" in (run / "logs" / f"{number}-0" / "preflight-node0.log").read_text()

"""A study as a job array on a real SLURM: every missing run is an element, started by the large jobs' launcher."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kdrl_mcore.studies.local import is_finished
from kdrl_mcore.studies.slurm import submit
from kdrl_mcore.studies.study import load_study
from tests.reference.tiny_models import make_qwen2, make_tokenizer
from tests.support.slurm_cluster import Cluster, needs_slurm

BASE = """
root: {folder}/runs
seeds: [1, 2]
overrides:
  - experiment=tiny_cpu
  - student.path={folder}/student
  - teacher.path=null
  - data.train={folder}/train.jsonl
  - data.eval=null
  - trainer.steps=1
  - trainer.self_test=false
  - reward=exact_match
  - rollout.prompts_per_step=2
  - checkpoint.every=-1
  - checkpoint.export_hf=false
"""

pytestmark = [needs_slurm, pytest.mark.timeout(600)]


def test_the_elements_of_an_array_are_the_runs_of_a_study(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_qwen2(tmp_path / "student", seed=1, num_layers=1)
    make_tokenizer(tmp_path / "student")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(4))
    )
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pair.yaml").write_text(BASE.format(folder=tmp_path))
    (tmp_path / "study.yaml").write_text("base: pair\ngrid: {method: {grpo: [objective=grpo]}}\n")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        **cluster.environment(),
        "KDRL_PYTHON": sys.executable,
        "KDRL_PREFLIGHT": "0",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    runs = load_study(tmp_path / "study.yaml")

    first = list(submit(runs, f"--output={tmp_path}/%A_%a.log"))
    assert first[0] == "2 runs: 0 finished, 2 to submit, the rest in the queue" and "2 runs on 1 node each" in first[1]
    assert list(submit(runs)) == ["2 runs: 0 finished, 0 to submit, the rest in the queue"]

    cluster.wait(lambda: not cluster.run("squeue", "--noheader"), "the array to end", 400)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert [is_finished(run) for run in runs] == [True, True], logs
    assert list(submit(runs)) == ["2 runs: 2 finished, 0 to submit, the rest in the queue"]

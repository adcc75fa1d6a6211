"""A rehearsal of `make gpu-check`: what it runs on a GPU also runs on paper CUDA, and every number that it promises is
there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.gpu_check import main


@pytest.mark.timeout(1800)
def test_the_check_of_a_gpu_runs_on_paper(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    stages = ["environment", "head", "cuda ipc", "train, off-loads", "sample"]
    arguments = ["--sizes", "small", "--under", "tests.paper_cuda", "--json", str(results), "--seconds", "1700"]
    code = main([*arguments, "--only", *stages])
    found = json.loads(results.read_text())
    assert code == 0, found
    assert list(found) == stages
    assert found["environment"]["gpu"] == "Paper H100" and found["environment"]["torch"]
    assert found["head"]["exact_tflops"] > 0 and found["head"]["exact_extra_gib"] > 0
    assert found["cuda ipc"]["buckets"] == 2
    trained = found["train, off-loads"]
    assert trained["tokens_per_s"] > 0 and trained["mfu"] > 0 and 0 < trained["head_share"] < 1
    assert trained["peak_gib"]["train"] > 0 and trained["planned_gib"]["backward"] > 0
    assert found["sample"]["tokens"] > 0

"""What all SLURM tests share: one cluster, and a job that takes a few seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reference.tiny_models import make_qwen2, make_tokenizer
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_jobs import tiny_job_on


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, which each test leaves without jobs."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random student and teacher, and prompts that they cannot solve."""
    folder = tmp_path_factory.mktemp("pair")
    for name, seed in (("student", 1), ("teacher", 2)):
        make_qwen2(folder / name, seed=seed, num_layers=2)
        make_tokenizer(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tiny_job(pair: Path) -> list[str]:
    """Overrides of a job with that pair."""
    return tiny_job_on(str(pair))

"""A step's trace names the phases, is complete, and is written only where it was requested."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from kdrl_mcore.config import ProfileConfig, load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.monitoring.profiler import StepProfiler
from kdrl_mcore.monitoring.stopwatch import Stopwatch
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.zoo import Zoo


def names(trace: Path) -> set[str]:
    return {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}


def test_only_the_named_steps_and_ranks_are_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileConfig(steps=[2], ranks=[1]), tmp_path, rank=1)
    other = StepProfiler(ProfileConfig(steps=[2], ranks=[1]), tmp_path, rank=0)
    for step in (1, 2, 3):
        for each in (profiler, other):
            with each(step), Clock()("teacher"):
                torch.ones(2, 2) @ torch.ones(2, 2)
            each.save(step)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "step_000002_rank_1.json.gz"
    assert {"teacher", "aten::mm"} <= names(trace)


def test_a_run_writes_a_trace_with_its_phases_and_says_how_much_of_it_the_head_is(
    ranks2: RankPool, zoo: Zoo, tmp_path: Path
) -> None:
    overrides = [*FAST, f"run.dir={tmp_path}", f"student.path={zoo.model('untied')}", f"teacher.path={zoo.model('teacher')}"]
    overrides += ["rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", "objective=kdrl", "parallel.pipeline=2"]
    overrides += ["trainer.steps=2", "trainer.profile.steps=[2]", "trainer.profile.ranks=[1]", "cluster.peak_tflops=0.5"]
    overrides += ["checkpoint.export_hf=false"]
    assert [outcome.code for outcome in ranks2.run(train_on_rank, overrides)] == [0, 0]
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "step_000002_rank_1.json.gz"
    assert {"teacher", "train", "head"} <= names(trace)
    for row in metrics_of(tmp_path):
        assert 0 < row["time/head"] < row["time/train"]  # measured on the last stage, known on rank 0
        assert row["time/head_share"] == pytest.approx(row["time/head"] / row["time/train"])
        assert row["time/mfu"] == pytest.approx(row["time/tflops"] / 0.5) and row["time/tflops"] > 0


def test_a_stopwatch_adds_up_and_begins_anew() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch():
            pass
    assert watch.take() > 0
    assert watch.take() == 0


@pytest.mark.parametrize("override", ["trainer.profile.steps=[0]", "trainer.profile.ranks=[-1]"])
def test_steps_and_ranks_that_cannot_be_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config([override])

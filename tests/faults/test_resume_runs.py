"""Runs that are interrupted at any point resume as if nothing had happened."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.reference.tiny_models import read_jsonl
from tests.support import resuming
from tests.support.ranks import RankPool
from tests.support.training import steps_of

STEPS = 16
EVERY = 3
LAYOUT = ["parallel.tensor=2"]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The run's overrides."""
    return [*resuming.make_job(tmp_path_factory.mktemp("job")), f"checkpoint.every={EVERY}", "checkpoint.keep=0"]


@pytest.fixture(scope="module")
def whole(job: list[str], ranks2: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    results = ranks2.run(resuming.train, [*job, *LAYOUT, f"run.dir={run_dir}", f"trainer.steps={STEPS}"], timeout=300)
    assert [code for code, _ in results] == [0, 0], results
    return run_dir


def test_interrupted_in_generation_in_an_update_and_in_a_save_a_run_equals_the_whole_one_bit_for_bit(
    job: list[str], whole: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*job, *LAYOUT, f"run.dir={tmp_path}", f"trainer.steps={STEPS}"]
    accidents = [
        (partial(resuming.in_generation, 5), "false", {4}, "step_000003"),
        (partial(resuming.in_an_update, 4), "false", {6}, "step_000006"),
        (partial(resuming.in_a_save, 1), "true", {9, 10, 11, 12}, "step_000006"),  # training continues while files are written
    ]
    for accident, asynchronous, last_step, latest in accidents:
        results = ranks2.run(resuming.train, [*overrides, f"checkpoint.asynchronous={asynchronous}"], accident, timeout=300)
        assert [code for code, _ in results] == [None, None]
        assert steps_of(tmp_path)[-1]["step"] in last_step
        assert (tmp_path / "checkpoints" / "latest").readlink() == Path(latest)
    assert [code for code, _ in ranks2.run(resuming.train, overrides, timeout=300)] == [0, 0]

    assert steps_of(tmp_path) == steps_of(whole)
    assert [row["step"] for row in steps_of(whole)] == list(range(1, STEPS + 1))
    assert len({row["beta"] for row in steps_of(whole)}) == STEPS
    assert [resuming.tokens(tmp_path, step) for step in range(1, STEPS + 1)] == [
        resuming.tokens(whole, step) for step in range(1, STEPS + 1)
    ]
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_signal_to_one_rank_makes_all_of_them_save_and_end_cleanly(
    job: list[str], whole: Path, ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*job, *LAYOUT, f"run.dir={tmp_path}", "trainer.steps=8", "checkpoint.every=0"]
    results = ranks2.run(resuming.train, overrides, partial(resuming.told_to_stop, 4))
    assert [code for code, _ in results] == [0, 0]
    assert steps_of(tmp_path) == steps_of(whole)[:4]
    assert not (tmp_path / "hf").exists()
    checkpoints = tmp_path / "checkpoints"
    assert ranks2.run(resuming.find, str(checkpoints)) == [f"{checkpoints}/step_000004"] * 2
    assert [code for code, _ in ranks2.run(resuming.train, overrides)] == [0, 0]
    assert steps_of(tmp_path) == steps_of(whole)[:8]


@pytest.mark.parametrize("accident", [resuming.on_a_full_disk, resuming.without_its_file_system])
def test_without_room_to_save_the_last_checkpoint_stays_whole_and_one_line_says_so(
    accident: Any, job: list[str], ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*job, *LAYOUT, f"run.dir={tmp_path}/run", f"trainer.steps={STEPS}"]
    results = ranks2.run(resuming.train, overrides, partial(accident, 2), timeout=240)
    assert [code for code, _ in results] == [1, 1]
    printed = "".join(errors for _, errors in results)
    lines = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "the checkpoint of step 6 could not be written" in lines[0]
    assert "Traceback" not in printed
    (found,) = tmp_path.glob("*/checkpoints")
    assert ranks2.run(resuming.find, str(found)) == [f"{found}/step_000003"] * 2


@pytest.mark.parametrize("name", ["common.pt", ".metadata.tmp", "metadata.json"])
def test_what_rank_0_alone_cannot_write_ends_all_ranks_together(
    name: str, job: list[str], ranks2: RankPool, tmp_path: Path
) -> None:
    overrides = [*job, *LAYOUT, f"run.dir={tmp_path}", f"trainer.steps={STEPS}"]
    results = ranks2.run(resuming.train, overrides, partial(resuming.rank_0_cannot_write, name, tmp_path, 6))
    assert [code for code, _ in results] == [1, 1]
    printed = "".join(errors for _, errors in results)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "the checkpoint of step 6 could not be written" in line and "Traceback" not in printed
    assert name in line, line
    checkpoints = tmp_path / "checkpoints"
    assert ranks2.run(resuming.find, str(checkpoints)) == [f"{checkpoints}/step_000003"] * 2


def test_unfinished_responses_are_in_the_checkpoint_bit_for_bit(job: list[str], ranks2: RankPool, tmp_path: Path) -> None:
    """A run with partial rollouts is stopped twice, once by a crash."""
    parts = ["rollout.partial_tokens=3", "rollout.steps_ahead=2", "rollout.max_age=4", "rollout.max_continuations=2"]
    correction = ["objective.sampler_correction.kind=truncate"]
    overrides = [*job, *parts, *correction, "trainer.steps=8"]
    whole, stopped = [*overrides, f"run.dir={tmp_path}/whole"], [*overrides, f"run.dir={tmp_path}/stopped"]
    assert [code for code, _ in ranks2.run(resuming.train, whole, timeout=300)] == [0, 0]
    assert [code for code, _ in ranks2.run(resuming.train, stopped, partial(resuming.told_to_stop, 4))] == [0, 0]
    state = json.loads((tmp_path / "stopped/checkpoints/latest/trainer_state.json").read_text())
    begun = [rollout for entry in state["ledger"]["waiting"] for rollout in entry["begun"] or ()]
    assert "partial" in {rollout["finish_reason"] for rollout in begun}
    assert [code for code, _ in ranks2.run(resuming.train, stopped, partial(resuming.in_an_update, 3))] == [None, None]
    assert [code for code, _ in ranks2.run(resuming.train, stopped, timeout=300)] == [0, 0]

    steps = steps_of(tmp_path / "whole")
    assert steps_of(tmp_path / "stopped") == steps
    for step in range(1, 9):
        assert resuming.tokens(tmp_path / "stopped", step) == resuming.tokens(tmp_path / "whole", step)
    rows = [row for step in range(1, 9) for row in read_jsonl(tmp_path / "whole/rollouts" / f"step_{step:06d}.jsonl")]
    assert max(row.get("continuations", 0) for row in rows) == 2 and any("later_versions" in row for row in rows)
    assert all(row["token_age_max"] <= 4 and row["drift_mean"] < 1 for row in steps)
    assert steps[-1]["prompts_trained"] == 24 and steps[-1]["prompts_waiting"] == steps[-1]["responses_unfinished"] == 0
    assert max(row["continued_share"] for row in steps) > 0.3 and max(row["responses_unfinished"] for row in steps) > 0
    export = "hf/model.safetensors"
    assert (tmp_path / "whole" / export).read_bytes() == (tmp_path / "stopped" / export).read_bytes()

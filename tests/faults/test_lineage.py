"""A run directory records its past: what may change when a run is resumed, which branch is current, and when nothing is left to
do."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_mcore.checkpointing.manifest import write_manifest
from kdrl_mcore.convert.targets import MARK
from kdrl_mcore.run_directory.lock import RunLock
from tests.reference.tiny_models import make_qwen2, make_tokenizer, read_hf_weights
from tests.support import ROOT, resuming
from tests.support.ranks import RankPool
from tests.support.training import Outcome, metrics_of, train_on_rank

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run whose beta is constant."""
    overrides = resuming.make_job(tmp_path_factory.mktemp("job"))
    return [*overrides[1:], "objective=kdrl", "checkpoint.keep=0", "checkpoint.asynchronous=false"]


def run(pool: RankPool, job: list[str], run_dir: Path, *overrides: str) -> Outcome:
    """A run on the pool's ranks; what rank 0 observed, with the errors of all ranks (the first rank that has one prints it)."""
    outcomes = pool.run(train_on_rank, [*job, f"run.dir={run_dir}", *overrides])
    assert len({outcome.code for outcome in outcomes}) == 1
    return replace(outcomes[0], stderr="".join(outcome.stderr for outcome in outcomes))


def finished(pool: RankPool, job: list[str], run_dir: Path, *overrides: str) -> Outcome:
    outcome = run(pool, job, run_dir, *overrides)
    assert outcome.code == 0, outcome.stderr
    return outcome


def refusal(pool: RankPool, job: list[str], run_dir: Path, *overrides: str) -> str:
    """The one line with which a run is refused before anything is written."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    outcome = run(pool, job, run_dir, *overrides)
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == 1 and line.startswith("error: "), outcome.stderr
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    return line


def column(run_dir: Path, name: str) -> list[Any]:
    return [row[name] for row in metrics_of(run_dir)]


def killed(pool: RankPool, job: list[str], run_dir: Path, step: int, *overrides: str) -> None:
    """A run that ends in the middle of a step, as if it were killed."""
    results = pool.run(resuming.train, [*job, f"run.dir={run_dir}", *overrides], partial(resuming.in_generation, step))
    assert [code for code, _ in results] == [None] * pool.world_size


@pytest.fixture(scope="module")
def trained(job: list[str], ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory after two steps, to copy."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    finished(ranks1, job, run_dir, "trainer.steps=2", "checkpoint.every=1")
    return run_dir


@pytest.fixture
def used(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def test_coefficients_and_rates_of_the_command_line_win_and_a_line_says_so(
    job: list[str], used: Path, ranks1: RankPool
) -> None:
    outcome = finished(ranks1, job, used, "trainer.steps=3", "objective.beta.init=0.5", "optimizer.lr=0.004")
    assert column(used, "beta") == [0.002, 0.002, 0.5]
    assert column(used, "lr") == [0.001, 0.001, 0.004]
    assert {"objective.beta.init: 0.002 -> 0.5", "optimizer.lr: 0.001 -> 0.004", "trainer.steps: 2 -> 3"} <= set(outcome.log)
    outcome = finished(ranks1, job, used, "trainer.steps=4", "objective=grpo", "optimizer.lr=0.004")
    assert column(used, "beta")[-1] == 0 and "objective.beta.init: 0.5 -> 0.0" in outcome.log
    outcome = finished(ranks1, job, used, "trainer.steps=5", "optimizer.lr=0.004")  # and back again
    assert column(used, "beta")[-1] == 0.002 and metrics_of(used)[-1]["teacher_tokens"] > 0
    assert not outcome.stderr


def test_what_makes_another_experiment_is_refused_with_the_difference(
    job: list[str], used: Path, ranks1: RankPool, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_qwen2(other, seed=1, num_layers=3)
    make_tokenizer(other)
    make_qwen2(tmp_path / "same shape", seed=7, num_layers=2)
    make_tokenizer(tmp_path / "same shape")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(25))
    )
    for changed, told in {
        f"student.path={other}": "num_layers 2 -> 3",
        f"student.path='{tmp_path}/same shape'": "student.path: ",
        f"teacher.path='{tmp_path}/same shape'": "teacher.path: ",
        f"data.train={tmp_path}/rows.jsonl": "data.train: ",
        "data.plain_template='{prompt} '": "data.plain_template: {prompt} -> {prompt} ",
        "trainer.seed=2": "trainer.seed: 1 -> 2",
        "optimizer.name=sgd": "optimizer.name: adam -> sgd",
        "model.dtype=bfloat16": "model.dtype: float32 -> bfloat16",
        "reward=math_verify": "reward.kind: exact_match -> math_verify",
        "objective=sft": "objective.kind: kdrl -> sft",
    }.items():
        line = refusal(ranks1, job, used, "trainer.steps=3", changed)
        assert told in line and "belongs to another experiment" in line, line


def test_the_same_files_in_another_place_are_the_same(job: list[str], used: Path, ranks1: RankPool, tmp_path: Path) -> None:
    folder = Path(next(word for word in job if word.startswith("data.train=")).partition("=")[2]).parent
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    paths = [f"student.path={moved}/student", f"teacher.path={moved}/teacher", f"data.train={moved}/train.jsonl"]
    assert any(line.startswith("data.train: ") for line in finished(ranks1, job, used, "trainer.steps=3", *paths).log)
    rows = (moved / "train.jsonl").read_text()
    (moved / "train.jsonl").write_text(rows.replace('"answer": "3"', '"answer": "4"'))
    assert "whose content has changed" in refusal(ranks1, job, used, "trainer.steps=4", *paths)


def test_with_nothing_left_to_train_a_run_is_complete_or_refused(job: list[str], used: Path, ranks1: RankPool) -> None:
    exported = used / "hf" / "model.safetensors"
    first, when = exported.read_bytes(), exported.stat().st_mtime_ns
    outcome = finished(ranks1, job, used, "trainer.steps=2", "checkpoint.every=1")
    assert outcome.log[-1].startswith("the run is complete: step 2 of 2")
    assert exported.stat().st_mtime_ns == when and len(metrics_of(used)) == 2
    shutil.rmtree(used / "hf")  # as if it had been killed between its last step and the export
    finished(ranks1, job, used, "trainer.steps=2", "parallel.recompute=full")
    assert exported.read_bytes() == first
    for words in (["trainer.steps=3", f"student.path={used}/hf"], ["trainer.steps=3", f"teacher.path={used}/hf"]):
        outcome = run(ranks1, job, used, *words, "checkpoint.resume=never")
        assert outcome.code == 2 and "is where this run exports its student" in outcome.stderr
    for words in (["trainer.steps=1"], ["trainer.steps=2", "objective=kd_rkl"], ["trainer.steps=2", "optimizer.lr=1e-2"]):
        assert "nothing is left to train" in refusal(ranks1, job, used, *words)


def test_going_back_leaves_a_branch_that_does_not_come_back(job: list[str], ranks1: RankPool, tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", "trainer.steps=6"
    finished(ranks1, job, run_dir, steps, "checkpoint.every=2")
    sampled = (run_dir / "rollouts" / "step_000004.jsonl").read_text()
    back = f"checkpoint.resume={run_dir}/checkpoints/step_000002"
    killed(ranks1, job, run_dir, 2, steps, "checkpoint.every=5", back, "optimizer.lr=5e-4")
    assert column(run_dir, "step") == [1, 2, 3]
    assert sorted(path.name for path in (run_dir / "rollouts").iterdir()) == [f"step_00000{step}.jsonl" for step in (1, 2, 3)]
    assert (run_dir / "checkpoints" / "latest").readlink() == Path("step_000002") and not (run_dir / "hf").exists()
    outcome = finished(ranks1, job, run_dir, steps, "checkpoint.every=5", "optimizer.lr=5e-4")
    assert any(line.endswith("step_000002 after step 2") for line in outcome.log)
    assert column(run_dir, "lr") == [1e-3] * 2 + [5e-4] * 4
    # The abandoned branch is kept aside and restored when its checkpoint is named.
    (left,) = (run_dir / "left").iterdir()
    assert len(metrics_of(left)) == 6 and (left / "rollouts" / "step_000004.jsonl").read_text() == sampled
    old = f"checkpoint.resume={run_dir}/checkpoints/step_000004"
    finished(ranks1, job, run_dir, "trainer.steps=5", old)
    assert column(run_dir, "lr") == [1e-3] * 5
    assert (run_dir / "rollouts" / "step_000004.jsonl").read_text() == sampled


def test_starting_anew_the_earlier_run_does_not_come_back(job: list[str], used: Path, ranks1: RankPool) -> None:
    words = ["trainer.steps=5", "checkpoint.every=4", "optimizer.lr=3e-3"]
    killed(ranks1, job, used, 3, *words, "checkpoint.resume=never")
    assert column(used, "lr") == [3e-3] * 2
    outcome = finished(ranks1, job, used, *words)
    assert not any(line.startswith("resumed") for line in outcome.log)
    assert column(used, "step") == [1, 2, 3, 4, 5] and column(used, "lr") == [3e-3] * 5


def test_from_another_directory_a_run_goes_on_there_and_not_from_what_lay_in_its_own(
    job: list[str], trained: Path, used: Path, ranks1: RankPool, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    words = ["trainer.steps=5", "checkpoint.every=4"]
    killed(ranks1, job, other, 1, *words, f"checkpoint.resume={used}/checkpoints/step_000002")
    assert any(line.startswith(f"resumed from {used}") for line in finished(ranks1, job, other, *words).log)
    assert column(other, "step") == [3, 4, 5]
    shutil.rmtree(other / "checkpoints")
    shutil.rmtree(used)
    assert "this run began from" in refusal(ranks1, job, other, "trainer.steps=6")


def test_the_newest_whole_checkpoint_is_never_pruned(job: list[str], used: Path, ranks1: RankPool) -> None:
    outcome = run(ranks1, job, used, "trainer.steps=4", "checkpoint.keep=-1")
    assert outcome.code == 2 and "checkpoint.keep=-1" in outcome.stderr
    ranks1.run(resuming.prune, str(used / "checkpoints"), -1, "step_000002")
    assert sorted(path.name for path in (used / "checkpoints").glob("step_*")) == ["step_000001", "step_000002"]
    (used / "checkpoints" / "step_000002" / "manifest.json").unlink()  # of the two, only the older one is complete
    ranks1.run(resuming.prune, str(used / "checkpoints"), 1, "step_000002")
    assert sorted(path.name for path in (used / "checkpoints").glob("step_*")) == ["step_000001", "step_000002"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("optimizer.name=sgd", "optimizer.name=sgd"),
        ("", "parallel.distributed_optimizer=false optimizer.adam_beta1=0.8"),
        ("parallel.distributed_optimizer=false", "optimizer.lr=5e-4"),
        ("model.dtype=bfloat16", "model.dtype=bfloat16 parallel.distributed_optimizer=false"),
        ("model.dtype=bfloat16 parallel.distributed_optimizer=false", "model.dtype=bfloat16"),
    ],
)
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(
    before: str, after: str, job: list[str], ranks2: RankPool, tmp_path: Path
) -> None:
    """Compared with a run whose kind of optimizer never changed; if no other key changes, with a run that never stopped."""
    words = ["trainer.self_test=false", "checkpoint.every=2"]
    finished(ranks2, job, tmp_path / "run", "trainer.steps=2", *words, *before.split())
    finished(ranks2, job, tmp_path / "run", "trainer.steps=4", *words, *after.split())
    kept = [word for word in before.split() if "distributed" in word]
    changed = [word for word in after.split() if "distributed" not in word]
    if changed != [word for word in before.split() if word not in kept]:
        finished(ranks2, job, tmp_path / "same", "trainer.steps=2", *words, *before.split())
    finished(ranks2, job, tmp_path / "same", "trainer.steps=4", *words, *changed, *kept)
    found, expected = (read_hf_weights(tmp_path / name / "hf") for name in ("run", "same"))
    for name in expected:
        assert torch.allclose(found[name].float(), expected[name].float(), rtol=1e-5, atol=1e-6), name


def as_written_before(run_dir: Path) -> None:
    """Turn a run directory into one of the versions that kept no record: checkpoints without configuration, no `run.json`, an
    export without a list of its files."""
    (run_dir / "run.json").unlink()
    (run_dir / "hf" / MARK).unlink()
    for checkpoint in (run_dir / "checkpoints").glob("step_*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        for name in ("config", "fingerprints", "lineage"):
            del state[name]
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, {})


def test_a_run_directory_of_an_earlier_version_goes_on(job: list[str], used: Path, ranks1: RankPool, tmp_path: Path) -> None:
    as_written_before(used)
    assert "trainer.seed: 1 -> 2" in refusal(ranks1, job, used, "trainer.steps=3", "trainer.seed=2")
    assert "nothing is left" in refusal(ranks1, job, used, "trainer.steps=2", "objective.beta.init=0.5")
    outcome = finished(ranks1, job, used, "trainer.steps=3", "objective.beta.init=0.5")
    assert "objective.beta.init: 0.002 -> 0.5" in outcome.log and column(used, "beta") == [0.002, 0.002, 0.5]
    assert (used / "left" / "hf_1" / "model.safetensors").is_file() and (used / "hf" / MARK).is_file()
    killed(ranks1, job, used, 1, "trainer.steps=4", f"checkpoint.resume={used}/checkpoints/step_000001", "checkpoint.every=-1")
    assert any("after step 1" in line for line in finished(ranks1, job, used, "trainer.steps=4").log)


def test_an_export_that_was_copied_or_added_to_is_kept(job: list[str], trained: Path, ranks1: RankPool, tmp_path: Path) -> None:
    """An export copied by `cp -r`, with other file times; then with a file of the user's. In another run's directory it blocks
    the export."""
    run_dir = tmp_path / "copied"
    shutil.copytree(trained, run_dir, symlinks=True, copy_function=shutil.copy)
    outcome = finished(ranks1, job, run_dir, "trainer.steps=3")
    assert any(line.endswith(f"is kept as {run_dir}/left/hf_1") for line in outcome.log)
    (run_dir / "hf" / "README.md").write_text("about it")
    finished(ranks1, job, run_dir, "trainer.steps=4", "checkpoint.export_hf=false")
    assert (run_dir / "hf" / "README.md").is_file()
    finished(ranks1, job, run_dir, "trainer.steps=5")
    assert (run_dir / "left" / "hf_2" / "README.md").read_text() == "about it" and column(run_dir, "step") == [1, 2, 3, 4, 5]
    exports = [(folder / "model.safetensors").read_bytes() for folder in (trained / "hf", run_dir / "left" / "hf_1")]
    assert exports[0] == exports[1]
    shutil.copytree(run_dir / "hf", tmp_path / "other" / "hf", copy_function=shutil.copy)
    assert "was not written by kdrl_mcore" in refusal(ranks1, job, tmp_path / "other", "trainer.steps=1")


def test_a_copy_that_followed_links_goes_on(job: list[str], used: Path, ranks1: RankPool) -> None:
    """In the directory `latest` is a folder, which stays; otherwise the first checkpoint could not have that name."""
    latest = used / "checkpoints" / "latest"
    newest = latest.resolve()
    latest.unlink()
    shutil.copytree(newest, latest)
    finished(ranks1, job, used, "trainer.steps=3")
    assert column(used, "step") == [1, 2, 3] and latest.readlink() == Path("step_000003")
    assert (used / "checkpoints" / "latest_copy_1" / "manifest.json").is_file()


def test_a_run_within_the_files_of_another_is_refused(job: list[str], used: Path, ranks1: RankPool) -> None:
    """Checkpoint folders come and go with that run's steps, and what is in them would be deleted with them."""
    for place in ("checkpoints", "checkpoints/step_000002", "hf/run", "rollouts/mine"):
        outcome = run(ranks1, job, used / place, "trainer.steps=1")
        assert outcome.code == 2 and f"lies in {used / place.split('/')[0]}, which the run in {used} replaces" in outcome.stderr
        assert not (used / place / "metrics.jsonl").exists()


def test_a_damaged_configuration_of_a_run_without_checkpoints_is_as_none(job: list[str], used: Path, ranks1: RankPool) -> None:
    shutil.rmtree(used / "checkpoints")
    (used / "config.yaml").write_bytes(b"run: \xff\xfe\n")
    finished(ranks1, job, used, "trainer.steps=1")
    assert column(used, "step") == [1]


def test_without_its_record_a_run_goes_on_all_the_same(job: list[str], used: Path, ranks1: RankPool) -> None:
    (used / "run.json").write_text("{")
    assert f"{used}/run.json is damaged" in refusal(ranks1, job, used, "trainer.steps=3")
    (used / "run.json").unlink()
    finished(ranks1, job, used, "trainer.steps=3")
    assert column(used, "step") == [1, 2, 3] and not (used / "left").exists()


def test_a_run_directory_in_use_is_refused_on_every_rank_and_not_touched(job: list[str], used: Path, ranks2: RankPool) -> None:
    with RunLock(used):
        line = refusal(ranks2, job, used, "trainer.steps=4")
    assert f"is in use by process {os.getpid()} on " in line
    assert run(ranks2, job, used, "trainer.steps=3").code == 0
    assert not (used / "lock.json").exists()


def test_the_record_says_what_was_started(job: list[str], used: Path, ranks1: RankPool) -> None:
    finished(ranks1, job, used, "trainer.steps=3", "optimizer.lr=2e-3")
    first, second = json.loads((used / "run.json").read_text())["starts"]
    assert first["resumed_from"] is None and first["step"] == 0 and first["changes"] == []
    assert second["resumed_from"].endswith("step_000002") and second["step"] == 2
    assert "optimizer.lr: 0.001 -> 0.002" in second["changes"] and "optimizer.lr=2e-3" in second["overrides"]
    assert first["branch"] == second["branch"] and second["world_size"] == 1
    assert second["versions"]["torch"] == torch.__version__ and {"megatron-core", "vllm", "python"} <= set(second["versions"])
    if (ROOT / ".git").exists():
        assert len(second["commit"].removesuffix("-dirty")) == 40

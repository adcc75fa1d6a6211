"""A NaN or an infinity on one rank alone: all ranks skip the update together, say so, and give up after three in a row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.reference.tiny_models import make_model, make_rollouts, read_hf_weights, read_jsonl, write_jsonl
from tests.support import resuming
from tests.support.ranks import RankPool
from tests.support.training import QUIET, Outcome, metrics_of, train_on_rank
from tests.support.zoo import Zoo

LAYOUTS = {
    "tp2": (2, "parallel.tensor=2"),
    "pp2": (2, "parallel.pipeline=2"),
    "dp2": (2, "batch.micro_tokens=60"),
    "tp2 pp2": (4, "parallel.tensor=2 parallel.pipeline=2"),
}


def poison_on_rank(overrides: list[str], where: str, rank: int, bad_steps: list[int]) -> Outcome:
    """Train, with a NaN in the loss, or an infinity in a gradient or a teacher's log-prob, on one rank at some steps."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    if dist.get_rank() != rank:
        return train_on_rank(overrides)
    with _poisoned(where, bad_steps):
        return train_on_rank(overrides)


@contextmanager
def _poisoned(where: str, bad_steps: list[int]) -> Iterator[None]:
    from kdrl_mcore.student.student import Student

    update, forward_backward = Student.update, Student._forward_backward
    steps = iter(range(1, 100))

    def count_update(student: Any, *args: Any) -> Any:
        student.poisoned = next(steps) in bad_steps
        return update(student, *args)

    def add_poison(student: Any, batches: Any) -> Any:
        measured = forward_backward(student, batches)
        if student.poisoned and where == "gradient":
            parameter = next(student.parts.parameters())
            parameter.main_grad.view(-1)[3] = float("inf")
        if student.poisoned and where == "loss":
            for sums, _ in measured:
                sums["loss"] = sums["loss"] * float("nan")
        if student.poisoned and where == "log-prob":
            for sums, maxima in measured:
                sums["kl_k1"], maxima["drift_max"] = sums["kl_k1"] + float("inf"), maxima["drift_max"] * float("nan")
        return measured

    with patch.object(Student, "update", count_update), patch.object(Student, "_forward_backward", add_poison):
        yield


def overrides_of(zoo: Zoo, run: Path, steps: int, layout: str) -> list[str]:
    return [
        f"run.dir={run}",
        f"student.path={zoo.model('untied')}",
        f"teacher.path={zoo.model('teacher')}",
        "rollout=replay",
        f"rollout.path={zoo.rollouts('uneven')}",
        f"trainer.steps={steps}",
        "optimizer.lr=0.01",
        *QUIET,
        *layout.split(),
    ]


@pytest.mark.parametrize("where", ["loss", "gradient", "log-prob"])
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_all_ranks_skip_the_update_and_go_on(
    ranks: int, layout: str, where: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    """Step 1 is bad on the last rank: the run ends as if that step had not been made."""
    poisoned = [*overrides_of(zoo, tmp_path / "poisoned", 2, layout)]
    outcomes = pools[ranks].run(poison_on_rank, poisoned, where, ranks - 1, [1])
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    assert [row["skipped_updates"] for row in metrics_of(tmp_path / "poisoned")] == [1, 0]
    said = [message for outcome in outcomes for message in outcome.log if "skipped" in message]
    assert len(said) == 1 and "step 1" in said[0]
    outcomes = pools[ranks].run(train_on_rank, [*overrides_of(zoo, tmp_path / "clean", 1, layout)])
    assert [outcome.code for outcome in outcomes] == [0] * ranks
    one_step, start = read_hf_weights(tmp_path / "clean" / "hf"), read_hf_weights(zoo.model("untied"))
    for name, weight in read_hf_weights(tmp_path / "poisoned" / "hf").items():
        assert torch.equal(weight, one_step[name]) and not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.tensor=1"], ids=["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("phase", ["rollout", "teacher", "train"])
def test_nan_logits_of_the_sampler_the_teacher_or_the_student_leave_the_weights_alone(
    phase: str, layout: str, ranks2: RankPool, tmp_path: Path
) -> None:
    """One model output is NaN on one rank. What follows from it (log-probs of the sampler or the teacher, or the loss and the
    gradient) never reaches the weights, and no run mistakes it for a KL of zero."""
    job = [*resuming.make_job(tmp_path), f"run.dir={tmp_path}/run", "trainer.steps=1", *layout.split()]
    fault = ["fault.kind=nan", "fault.rank=1", "fault.step=1", f"fault.phase={phase}"]
    outcomes = ranks2.run(train_on_rank, [*job, *fault])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    (row,) = metrics_of(tmp_path / "run")
    assert row["skipped_updates"] == 1 and row.get("kl") != 0
    start, end = read_hf_weights(tmp_path / "student"), read_hf_weights(tmp_path / "run" / "hf")
    assert all(torch.equal(weight, start[name]) for name, weight in end.items())


def test_three_in_a_row_end_the_run_with_one_line(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """Steps 1 and 3 to 5 are bad: the good step 2 resets the count, and its update is saved."""
    job = [*overrides_of(zoo, tmp_path, 9, "parallel.tensor=2"), "checkpoint.every=1", "checkpoint.keep=1"]
    outcomes = ranks2.run(poison_on_rank, job, "gradient", 1, [1, 3, 4, 5])
    assert [outcome.code for outcome in outcomes] == [1, 1]
    printed = "".join(outcome.stderr for outcome in outcomes)
    assert [line for line in printed.splitlines() if line.startswith("error:")] == [printed.strip()]
    assert "3 updates in a row" in printed and "step 5" in printed and str(tmp_path) in printed
    assert [row["skipped_updates"] for row in metrics_of(tmp_path)] == [1, 0, 1, 1, 1]
    assert f"{tmp_path}/checkpoints/step_000005" in printed

    def saved() -> list[str]:
        return sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))

    assert saved() == [f"step_{step:06d}" for step in (2, 3, 4, 5)]  # the last weights may be the cause, so none is deleted
    outcomes = ranks2.run(poison_on_rank, [*job, "trainer.steps=8"], "gradient", 1, [1, 2])  # two more do not end the run
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert [row["skipped_updates"] for row in metrics_of(tmp_path)] == [1, 0, 1, 1, 1, 1, 1, 0]
    assert saved() == ["step_000008"]


def only_error(outcomes: list[Outcome]) -> str:
    (line,) = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error:")]
    return line


UPDATED = {
    "dp2": (2, "batch.micro_tokens=60"),
    "dp2 unsharded optimizer": (2, "batch.micro_tokens=60 parallel.distributed_optimizer=false"),
    "dp2 gathered late": (2, "batch.micro_tokens=60 parallel.overlap_grad_reduce=true parallel.overlap_param_gather=true"),
    "tp2 bf16": (2, "parallel.tensor=2 model.dtype=bfloat16"),
    "pp2": (2, "parallel.pipeline=2"),
    "cp2": (2, "parallel.context=2"),
    "ep2": (2, "parallel.expert=2 batch.micro_tokens=60"),
}


@pytest.mark.parametrize(("ranks", "layout"), UPDATED.values(), ids=list(UPDATED))
def test_weights_that_an_update_spoils_are_neither_saved_nor_exported(
    ranks: int, layout: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    """The update damages the last rank's share of the weights. The last checkpoint stays: the same command resumes from it."""
    job = [*overrides_of(zoo, tmp_path, 3, layout), "checkpoint.every=1", "checkpoint.keep=1"]
    if "expert" in layout:
        student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
        rollouts = write_jsonl(tmp_path / "rollouts.jsonl", make_rollouts(student, seed=13))
        job += [f"student.path={student}", f"rollout.path={rollouts}", "teacher.path=null", "objective=grpo"]
    fault = ["fault.kind=nan", "fault.phase=update", "fault.step=2", f"fault.rank={ranks - 1}"]
    outcomes = pools[ranks].run(train_on_rank, [*job, *fault])
    assert [outcome.code for outcome in outcomes] == [1] * ranks, outcomes[0].stderr
    line = only_error(outcomes)
    saved = tmp_path / "checkpoints" / "step_000001"
    assert line.startswith("error: the update of step 2 made weights NaN or infinite") and str(saved) in line
    assert sorted((tmp_path / "checkpoints").glob("step_*")) == [saved] and not (tmp_path / "hf").exists()
    rows = metrics_of(tmp_path)
    assert [row["skipped_updates"] for row in rows] == [0, 0] and all(row["grad_norm"] > 0 for row in rows)
    if layout == UPDATED["dp2"][1]:
        outcomes = pools[ranks].run(train_on_rank, job)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
        assert all(weight.isfinite().all() for weight in read_hf_weights(tmp_path / "hf").values())


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """The checkpoint was made before weights were checked: nothing is trained, and nothing is deleted."""
    job = [*overrides_of(zoo, tmp_path, 2, "parallel.tensor=2"), "checkpoint.every=1", "trainer.self_test=false"]
    spoil = [*job, "trainer.steps=1", "fault.kind=nan", "fault.phase=update", "fault.rank=0"]
    outcomes = ranks2.run(without_a_look_at_weights_on_rank, spoil)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    outcomes = ranks2.run(train_on_rank, job)
    assert [outcome.code for outcome in outcomes] == [1, 1]
    line = only_error(outcomes)
    assert "step_000001" in line and "NaN or infinite" in line and "checkpoint.resume" in line


def without_a_look_at_weights_on_rank(overrides: list[str]) -> Outcome:
    """Train as before this check existed."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.student.optimizer import Optimizer

    with patch.object(Optimizer, "_look_at_weights", lambda optimizer: None):
        return train_on_rank(overrides)


def test_a_teacher_that_gives_nan_is_noticed_before_the_update(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """The teacher's weights contain a NaN: every rank skips the update and leaves weights and norm untouched."""
    import shutil

    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(zoo.model("teacher"), teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    overrides = [*overrides_of(zoo, tmp_path / "run", 1, ""), f"teacher.path={teacher}"]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert metrics_of(tmp_path / "run")[0]["skipped_updates"] == 1
    start = read_hf_weights(zoo.model("untied"))
    assert all(torch.equal(weight, start[name]) for name, weight in read_hf_weights(tmp_path / "run" / "hf").items())


def test_beta_zero_and_masked_responses_never_reach_the_teacher(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """Tokens are counted in the teacher's model; the metrics report how many it scored and how many it was spared."""
    rows = read_jsonl(zoo.rollouts("uneven"))
    lengths = [len(row["response_token_ids"]) for row in rows]
    wrong = [not row["correct"] for row in rows]
    expected = sum(length for length, use in zip(lengths, wrong, strict=True) if use)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    both = "parallel.tensor=2 teacher.parallel.tensor=2 trainer.self_test=false"  # each rank sees all of the teacher's input
    masked = [*overrides_of(zoo, tmp_path / "masked", 1, both), "objective.kd.mask=response"]
    for outcome in ranks2.run(count_teacher_tokens_on_rank, masked):
        assert outcome.code == 0 and outcome.found == {"responses": sum(wrong), "tokens": expected}
    metrics = metrics_of(tmp_path / "masked")[0]
    assert (metrics["teacher_tokens"], metrics["teacher_tokens_saved"]) == (expected, sum(lengths) - expected)

    # beta is 0.002 at step 1 and 0 at step 2
    fades = ["objective.beta.kind=switch", "objective.beta.steps=1", "objective.beta.after=0"]
    for outcome in ranks2.run(count_teacher_tokens_on_rank, [*overrides_of(zoo, tmp_path / "fades", 2, both), *fades]):
        assert outcome.code == 0 and outcome.found == {"responses": len(rows), "tokens": sum(lengths)}
    assert [row["teacher_tokens"] for row in metrics_of(tmp_path / "fades")] == [sum(lengths), 0]
    assert [row["teacher_tokens_saved"] for row in metrics_of(tmp_path / "fades")] == [0, sum(lengths)]


def count_teacher_tokens_on_rank(overrides: list[str]) -> Outcome:
    """Train, counting the responses and their tokens that pass through the teacher's model."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model.gpt import LanguageModel

    counts = {"responses": 0, "tokens": 0}
    run_batch = LanguageModel.run_batch

    def counted(chunk: Any, batch: Any) -> Any:  # the student's training does not call this
        counts["responses"] += len(batch.spans)
        counts["tokens"] += len(batch.rows_T)
        return run_batch(chunk, batch)

    with patch.object(LanguageModel, "run_batch", counted):
        outcome = train_on_rank(overrides)
    outcome.found = counts
    return outcome

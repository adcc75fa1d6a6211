"""The effect of settings on a whole run: what it evaluates, where its learning rate ends, what it shows and what it does not
replay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import FAST, Outcome, metrics_of, steps_of, train_on_rank, train_scoring_early_on_rank
from tests.support.zoo import Zoo


def run(pool: RankPool, zoo: Zoo, folder: Path, *overrides: str) -> Outcome:
    rows = [{"prompt": f"{index}+1=", "answer": str(index + 1), "response": str(index + 1)} for index in range(4)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"run.dir={folder}/run", f"student.path={zoo.model('untied')}", f"teacher.path={zoo.model('teacher')}"]
    settings += [f"data.train={folder}/data.jsonl", "data.template=plain", "reward=exact_match", "reward.workers=1"]
    settings += ["rollout.max_response_tokens=8", "rollout.prompts_per_step=4", "rollout.responses_per_prompt=2"]
    return pool.run(train_on_rank, [*settings, *FAST, "checkpoint.export_hf=false", *overrides])[0]


def test_no_steps_are_an_evaluation(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    held_out = ("trainer.steps=0", f"data.eval={tmp_path}/data.jsonl", "eval.greedy=false")
    outcome = run(ranks1, zoo, tmp_path, *held_out)
    assert outcome.code == 0, outcome.stderr
    (row,) = metrics_of(tmp_path / "run")
    assert row["step"] == 0 and "eval/accuracy" in row and "loss" not in row


@pytest.mark.parametrize("overrides", [["data.eval=null"], ["data.eval=x.jsonl", "eval.every=-1"]])
def test_no_steps_and_nothing_to_evaluate_are_refused(overrides: list[str], zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    outcome = run(ranks1, zoo, tmp_path, "trainer.steps=0", *overrides)
    assert outcome.code == 2 and outcome.stderr.startswith("error: trainer.steps=0 only evaluates, and there is nothing")


@pytest.mark.parametrize(("objective", "updates"), [("sft", 1), ("sft", 4), ("kdrl", 4)])
def test_the_learning_rate_arrives(objective: str, updates: int, zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    schedule = ("trainer.steps=4", "optimizer.schedule=linear", "optimizer.lr=1e-3", f"batch.updates_per_step={updates}")
    outcome = run(ranks1, zoo, tmp_path, f"objective={objective}", *schedule)
    assert outcome.code == 0, outcome.stderr
    rates = [row["lr"] for row in metrics_of(tmp_path / "run")]
    left = [4 * updates - (step * updates - 1) for step in range(1, 5)]  # of the schedule, before the step's last update
    assert rates == pytest.approx([1e-3 * each / (4 * updates) for each in left])


def test_a_run_ends_where_its_accuracy_rises_no_more(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    """A random model gets nothing right, so the first evaluation is the best. When the run is started again, it ends again."""
    settings = ("objective=grpo", "trainer.steps=9", f"data.eval={tmp_path}/data.jsonl", "eval.every=1", "trainer.stop_after=2")
    for _ in range(2):
        outcome = run(ranks1, zoo, tmp_path, *settings, "checkpoint.every=0", "checkpoint.export_hf=true")
        assert outcome.code == 0, outcome.stderr
        assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3]
        assert any(line.startswith("ended after step 3: 2 evaluations brought no accuracy above 0.0 %") for line in outcome.log)
        assert json.loads((tmp_path / "run" / "run.json").read_text())["exported"][1] == 3  # its steps, not trainer.steps
    assert (tmp_path / "run" / "checkpoints" / "latest").readlink() == Path("step_000003")
    # For other problems there is no evaluation yet.
    outcome = run(ranks1, zoo, tmp_path, *settings, "checkpoint.every=0", "eval.max_prompts=2")
    assert outcome.code == 0 and [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_checkpoint_of_the_best_evaluation_is_kept(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    """The longest responses count as the best: a student that learns to end its responses has its best evaluation early."""
    settings = ["objective=sft", "trainer.steps=4", f"data.eval={tmp_path}/data.jsonl", "eval.every=1", "eval.greedy=false"]
    settings += ["checkpoint.every=1", "checkpoint.keep=1", "checkpoint.best=eval/response_length", "optimizer.lr=1e-2"]
    outcome = run(ranks1, zoo, tmp_path, *settings)
    assert outcome.code == 0, outcome.stderr
    lengths = {row["step"]: row["eval/response_length"] for row in metrics_of(tmp_path / "run")}
    longest = next(step for step, length in lengths.items() if length == max(lengths.values()))
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "best").readlink() == Path(f"step_{longest:06d}")
    assert {path.name for path in folder.glob("step_*")} == {f"step_{longest:06d}", "step_000004"}
    assert longest < 4  # responses get shorter, so the best evaluation is not the last

    outcome = run(ranks1, zoo, tmp_path, *settings, "checkpoint.best=eval/truncated", "trainer.steps=5")
    assert outcome.code == 0, outcome.stderr
    assert (folder / "best").readlink() == Path("step_000005")  # the first one by another measure, whatever the previous best


def test_a_reward_of_ones_own_that_fails_costs_no_step(zoo: Zoo, ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    """On two ranks, the reward fails where it verifies; both ranks save the earlier steps and end. The line names the user's
    code."""
    settings = (
        "objective=kd_rkl",
        "trainer.steps=3",
        "checkpoint.every=0",
        "reward.kind=tests.support.rewards:fails_in_step_2",
    )
    outcome = run(ranks2, zoo, tmp_path, *settings)
    assert outcome.code == 1 and (tmp_path / "run" / "checkpoints" / "latest").readlink() == Path("step_000001")
    outcome = run(ranks1, zoo, tmp_path, *settings)
    assert outcome.code == 1 and outcome.stderr.startswith("error: reward tests.support.rewards:fails_in_step_2 failed at ")
    assert re.fullmatch(r"error: .* failed at \S+/rewards\.py:\d+: KeyError: 'no such key'\n", outcome.stderr), outcome.stderr
    outcome = run(ranks1, zoo, tmp_path, *settings, "reward.terms=[{kind: 'tests.support.rewards:WithoutAScore'}]")
    assert outcome.code == 1 and "WithoutAScore failed at" in outcome.stderr and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["eval/nothing", "eval/maj@1", "eval/greedy_accuracy"])
def test_a_best_checkpoint_by_no_metric_is_refused_before_anything_is_loaded(
    name: str, zoo: Zoo, ranks1: RankPool, tmp_path: Path
) -> None:
    settings = ("objective=sft", f"data.eval={tmp_path}/data.jsonl", "eval.every=1", "eval.greedy=false", "checkpoint.every=1")
    outcome = run(ranks1, zoo, tmp_path, *settings, f"checkpoint.best={name}", "student.path=nowhere/at/all")
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1
    assert f"checkpoint.best={name} is not a metric of the evaluations; there are: eval/accuracy, " in outcome.stderr


def test_half_of_the_responses_are_given(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """Given responses come from the data set's column; a stopped run resumes with the same ones. Rollout files have only
    sampled responses."""
    settings = ("objective=gkd", "optimizer.lr=1e-2", "reward.kind=tests.support.rewards:LengthModulo", "data.shuffle=true")
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for steps in parts:
            more = (f"run.dir={tmp_path}/{name}", f"trainer.steps={steps}", "checkpoint.every=2")
            outcome = run(ranks2, zoo, tmp_path, *settings, *more)
            assert outcome.code == 0, outcome.stderr
    whole, parts = (steps_of(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    assert [(row["given_responses"], row["samples"]) for row in whole] == [(8, 16)] * 4
    assert all(row["given_tokens"] == 16 and row["drift_max"] < 1e-3 and row["kl_full"] > 0 for row in whole)
    lines = read_jsonl(tmp_path / "whole" / "rollouts" / "step_000001.jsonl")
    assert len(lines) == 8 and whole[0]["response_length"] == sum(len(line["response_token_ids"]) for line in lines) / 8


def test_groups_without_signal_are_replaced(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """On two data-parallel ranks, which share the verification, a step trains on as many groups as without the filter."""
    settings = ["objective=grpo", "trainer.steps=3", "rollout.responses_per_prompt=3", "rollout.group_filter.rounds=2"]
    outcome = run(ranks2, zoo, tmp_path, *settings, "reward.kind=tests.support.rewards:LengthModulo")
    assert outcome.code == 0, outcome.stderr
    rows = metrics_of(tmp_path / "run")
    for row in rows:
        step = read_jsonl(tmp_path / "run" / "rollouts" / f"step_{row['step']:06d}.jsonl")
        verdicts = [[rollout["correct"] for rollout in step if rollout["group_id"] == group] for group in range(4)]
        with_signal = sum(0 < sum(group) < 3 for group in verdicts)
        assert len(step) == 12 and [len(group) for group in verdicts] == [3] * 4
        assert row["groups_sampled"] == 4 * (1 + row["resampling_rounds"])
        assert with_signal == min(4, round(row["signal_share"] * row["groups_sampled"]))
        assert with_signal == 4 or row["resampling_rounds"] == 2
    assert any(row["resampling_rounds"] for row in rows)


def test_scores_of_groups_that_are_dropped_go_with_them(zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    """A run that scores responses while others are sampled equals one that does not, for log-probs and for hidden states."""
    settings = ["objective=kdrl", "objective.beta.init=0.5", "trainer.steps=3", "rollout.responses_per_prompt=3"]
    settings += ["rollout.group_filter.rounds=3", "rollout.prompts_per_step=3", "objective.kd.mask=response"]
    settings += [f"student.path={zoo.model('untied')}", f"teacher.path={zoo.model('teacher')}", "reward.workers=1", *FAST]
    rows = [{"prompt": f"{index}+1=", "answer": str(index % 3)} for index in range(7)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    settings += [f"data.train={tmp_path}/data.jsonl", "data.template=plain", "rollout.max_response_tokens=40"]
    settings += ["reward.kind=tests.support.rewards:LengthModulo", "checkpoint.export_hf=false"]
    scored = dropped = 0.0
    for estimator in ("k2", "exact"):
        steps = []
        for on_rank in (train_on_rank, train_scoring_early_on_rank):
            folder = tmp_path / f"{estimator}_{on_rank.__name__}"
            outcomes = ranks2.run(on_rank, [*settings, f"run.dir={folder}", f"objective.kd.estimator={estimator}"])
            assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
            steps.append(steps_of(folder))
        for late, early in zip(*steps, strict=True):
            assert late.pop("teacher_tokens_early") == late.pop("teacher_tokens_dropped") == 0
            scored += early.pop("teacher_tokens_early")
            dropped += early.pop("teacher_tokens_dropped")
            assert early == pytest.approx(late, rel=1e-4, abs=1e-6)
    assert scored > 0 and dropped > 0


def test_a_warm_up_longer_than_the_run_is_told(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    outcome = run(ranks1, zoo, tmp_path, "objective=sft", "trainer.steps=1", "optimizer.warmup_steps=5")
    assert outcome.code == 0 and any("more than the run's 1 updates" in line for line in outcome.log)


def test_the_first_prompt_is_shown_as_the_model_reads_it(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    template = 'data.plain_template="{prompt}\\n"'  # a backslash and an n
    outcome = run(ranks1, zoo, tmp_path, "objective=sft", "trainer.steps=1", template)
    (line,) = [line for line in outcome.log if line.startswith("the first prompt, data-1, decoded from its ")]
    assert line.endswith(r"tokens: '0+1=\\n'")


def changed(**values: Any) -> Any:
    return lambda row: {**row, **values}


def with_log_prob(value: float) -> Any:
    return lambda row: {**row, "sampler_log_probs": [value, *row["sampler_log_probs"][1:]]}


def longer(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "response_token_ids": [1] * 600, "sampler_log_probs": [-1.0] * 600}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_log_prob(2.5), "line 2: the sampler's log-prob of response token 0 is 2.5"),
        (with_log_prob(-30.0), "log-prob of response token 0 is -30, those of sampled tokens lie between -24 and 0"),
        (with_log_prob(-1000.0), "log-prob of response token 0 is -1000"),
        (longer, "positions of "),
        (changed(prompt_token_ids=[10**6]), "token id 1000000 is not one of"),
    ],
)
def test_what_cannot_be_replayed_is_named(change: Any, expected: str, zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    rows = read_jsonl(zoo.rollouts("uneven"))
    rows[1] = change(rows[1])
    write_jsonl(tmp_path / "rows.jsonl", rows)
    outcome = run(ranks1, zoo, tmp_path, "rollout=replay", f"rollout.path={tmp_path}/rows.jsonl", "trainer.steps=1")
    assert outcome.code == 1 and f"error: {tmp_path}/rows.jsonl line 2: " in outcome.stderr and expected in outcome.stderr


def test_more_updates_than_groups_are_refused(zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    replay = ("rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", "batch.updates_per_step=50")
    outcome = run(ranks1, zoo, tmp_path, *replay, "trainer.steps=1")
    assert outcome.code == 2 and "groups to share among them: lower it" in outcome.stderr

"""Given responses in addition to those of another source: how many, which ones, and what a checkpoint keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrl_mcore.config import load_config
from kdrl_mcore.config.derived import num_given
from kdrl_mcore.data.limits import Limits
from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.rollout.given import WithGivenResponses, read_given
from kdrl_mcore.rollout.replay import ReplayedRollouts
from kdrl_mcore.student.batch import TrainingBatch
from kdrl_mcore.types import FinishReason, Prompt, Rollout
from tests.support.sources import make, run, through_json

LIMITS = Limits(tokens=50, positions=20, model="m")
ANSWERED = [Prompt(f"g{i}", "q", np.array([i]), "a", target=np.array([i, 9])) for i in range(5)]


def beside(source: Any, answered: list[Prompt] = ANSWERED) -> Any:
    """A source with as many given responses as others."""
    joined: Any = WithGivenResponses(source, PromptStream(answered, 1, 0, shuffle=True), source._student, lambda others: others)
    joined._student = source._student
    return joined


def test_the_share_is_that_of_the_whole_batch() -> None:
    for share, others, expected in ((0.5, 12, 12), (0.25, 12, 4), (0.9, 2, 18), (0.01, 12, 0)):
        config = load_config(["objective=gkd", "student.path=s", "teacher.path=t", f"rollout.given.share={share}"])
        assert num_given(config, others) == expected
    assert num_given(load_config(["objective=grpo", "student.path=s"]), 12) == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_each_step_draws_the_next_ones_and_a_checkpoint_knows_where_they_are(ahead: int) -> None:
    alone, whole, stopped, resumed = make(ahead), beside(make(ahead)), beside(make(ahead)), beside(make(ahead))
    expected = run(whole, [1, 2, 3, 4])
    assert [step[:2] for step in expected] == run(alone, [1, 2, 3, 4])  # the others are unchanged
    given = [name for step in expected for name, *_ in step[2:]]
    assert sorted(given[:5]) == [f"g{i}" for i in range(5)] and given[:5] != sorted(given[:5])
    run(stopped, [1, 2])
    stopped.finish()
    resumed._student.version = 2
    resumed.load_state_dict(through_json(stopped.state_dict()))
    assert run(resumed, [3, 4]) == expected[2:]


def test_a_run_that_had_none_begins_with_the_first_ones() -> None:
    stopped, resumed = make(0), beside(make(0))
    run(stopped, [1])
    resumed.load_state_dict(through_json(stopped.state_dict()))
    resumed._student.version = 1
    assert run(resumed, [2])[0][2:] == run(beside(make(0)), [1])[0][2:]
    stopped.load_state_dict(through_json(resumed.state_dict()))  # and a source without given responses resumes too


def rollouts(*ends: FinishReason, length: int = 3) -> list[Rollout]:
    ids = np.arange(1, length + 1)
    mu = -np.ones(length, np.float32)
    return [Rollout(f"r{i}", 7, ids, ids, mu, end, 0, reward=1.0, correct=True) for i, end in enumerate(ends)]


def test_they_stand_after_replayed_ones_without_a_verdict(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "replay.jsonl", rollouts("stop", "length"))
    replayed: Any = ReplayedRollouts(tmp_path / "replay.jsonl", LIMITS, 1)
    replayed._student = make()._student
    found = beside(replayed).rollouts(1)
    assert [(each.given, each.group_id, each.correct, each.reward) for each in found] == [
        *((False, 7, True, 1.0), (False, 7, True, 1.0), (True, 8, False, 0.0), (True, 9, False, 0.0))
    ]
    assert all(each.finish_reason == "stop" and not each.sampler_log_probs.any() for each in found[2:])


def test_given_responses_are_neither_verified_nor_filtered() -> None:
    source = make(0)
    asked: list[list[str]] = []
    source.verify = lambda rollouts: asked.append([rollout.prompt_id for rollout in rollouts])
    joined = beside(source)
    joined.refit()
    joined.verify(joined.rollouts(1))
    assert asked == [["p0", "p1"]]


def test_every_update_gets_its_share_of_them() -> None:
    found = beside(make(0)).rollouts(1)
    parts = TrainingBatch(found, torch.ones(4).bool()).split_by_group(2)
    assert [[rollout.given for rollout in part.rollouts] for part in parts] == [[False, True]] * 2


def test_a_file_gives_the_responses_that_ended_by_themselves(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "given.jsonl", rollouts("stop", "length", "stop"))
    prompts, cut_off = read_given(tmp_path / "given.jsonl", LIMITS, 3)
    assert [prompt.prompt_id for prompt in prompts] == ["r0", "r2"] and cut_off == 1
    assert prompts[0].target is not None and prompts[0].target.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "longest", "told"),
    [
        (rollouts("length"), 3, "holds no response that was not cut off"),
        (rollouts("stop", length=4), 3, r"line 1: the given response has 4 tokens, more than rollout\.max_response_tokens=3"),
        (rollouts("stop", length=11), 20, "line 1: prompt and response have 22 tokens, more than the 20 positions"),
        (rollouts("stop", length=2)[:1] * 3 + rollouts("stop", length=60), 90, "line 4: token id 60 is not one of"),
    ],
)
def test_what_cannot_be_given_is_named(lines: list[Rollout], longest: int, told: str, tmp_path: Path) -> None:
    write_rollouts(tmp_path / "given.jsonl", lines)
    with pytest.raises(DataError, match=told):
        read_given(tmp_path / "given.jsonl", LIMITS, longest)

"""With `batch.share_prompts` a prompt is computed once for all its responses in a micro-batch and the results are the same: the
loss, the log-prob of every token under student and teacher, and the gradient of every parameter are those of the dense
reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.support.agreement import JOINT, Case, StudentLayout, case, check
from tests.support.ranks import RankPool
from tests.support.training import Outcome, train_on_rank
from tests.support.zoo import Zoo

SHARED = "batch.share_prompts=true"
LAYOUTS = [
    StudentLayout(1, 1, 1, 1),
    StudentLayout(1, 1, 1, 2),
    StudentLayout(1, 1, 2, 1),
    StudentLayout(1, 1, 4, 1),
    StudentLayout(2, 1, 2, 1, sequence_parallel=True),
    StudentLayout(2, 2, 1, 1),
    StudentLayout(1, 2, 2, 1),
    StudentLayout(1, 2, 1, 2, virtual_pipeline=2),
]
EXACT = replace(JOINT, estimator="exact", mask="response")
OTHERS = {
    "a group in several micro-batches": Case(1, "batch.micro_tokens=30"),
    "every response in a micro-batch of its own": Case(2, "batch.micro_tokens=1"),
    "one micro-batch": Case(1, "batch.micro_tokens=1000"),
    "prompts longer than responses, cp2": Case(2, "parallel.context=2", rollouts="long_prompts"),
    "one response, dp2: a rank has no tokens": Case(2, settings=replace(JOINT, alpha=0.0), rollouts="one"),
    "recompute, pp2": Case(2, "parallel.pipeline=2 parallel.recompute=full batch.micro_tokens=40"),
    "core attention recomputed, tp2": Case(2, "parallel.tensor=2 parallel.recompute=selective"),
    "deterministic, cp2": Case(2, "parallel.context=2 trainer.deterministic=true"),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("settings", [JOINT, EXACT], ids=["k2", "exact, masked"])
def test_layouts(layout: StudentLayout, settings: Any, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    one = case(layout, settings)
    check(replace(one, overrides=f"{one.overrides} {SHARED}"), zoo, pools[layout.ranks], tmp_path)


@pytest.mark.parametrize("one", OTHERS.values(), ids=list(OTHERS))
def test_micro_batches_and_activations(one: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(replace(one, overrides=f"{one.overrides} {SHARED}"), zoo, pools[one.ranks], tmp_path)


def count_rows(overrides: Sequence[str]) -> Outcome:
    """Train and count the rows of the student's training passes and of all other passes."""
    from kdrl_mcore.model.gpt import LanguageModel

    rows = {"training": 0, "scoring": 0}
    pack = LanguageModel.pack_batch

    def counted(chunk: Any, batch: Any) -> Any:
        rows["training" if chunk.training else "scoring"] += len(batch.tokens_S)
        return pack(chunk, batch)

    with patch.object(LanguageModel, "pack_batch", counted):
        outcome = train_on_rank(overrides)
    outcome.found = rows
    return outcome


def test_the_rows_of_a_prompt_exist_once(zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    """Both in the updates and in the passes of teacher and reference."""
    rows = zoo.rows("uneven")
    prompts = {row["group_id"]: len(row["prompt_token_ids"]) for row in rows}
    responses = sum(len(row["response_token_ids"]) for row in rows)
    every = responses + sum(len(row["prompt_token_ids"]) for row in rows)
    found = {}
    for shared in ("true", "false"):
        overrides = [
            f"run.dir={tmp_path / shared}",
            f"student.path={zoo.model('untied')}",
            f"teacher.path={zoo.model('teacher')}",
            "rollout=replay",
            f"rollout.path={zoo.rollouts('uneven')}",
            "objective.beta.init=0.1",
            "objective.reference_kl.coefficient=0.1",
            "trainer.steps=1",
            "trainer.self_test=false",
            "batch.micro_tokens=1000",
            f"batch.share_prompts={shared}",
        ]
        (outcome,) = pools[1].run(count_rows, overrides)
        assert outcome.code == 0, outcome.stderr
        found[shared] = outcome.found
    once = responses + sum(prompts.values())
    assert found == {
        "true": {"training": once, "scoring": 2 * once},
        "false": {"training": every, "scoring": 2 * every},
    }

"""Batches from which nothing is learned, or that leave a rank without work: on every layout training continues, and nothing
becomes NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.tiny_models import read_hf_weights, read_jsonl, write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.zoo import Zoo

Rows = list[dict[str, Any]]


def equally_right(rows: Rows) -> Rows:
    """There is no advantage, and the mask leaves nothing to distil."""
    return [{**row, "reward": 1.0, "correct": True} for row in rows]


def equally_wrong(rows: Rows) -> Rows:
    """There is no advantage: only distillation trains."""
    return [{**row, "reward": 0.0, "correct": False} for row in rows]


def all_truncated(rows: Rows) -> Rows:
    """Every response reached the limit."""
    return [{**row, "finish_reason": "length"} for row in rows]


def one_short_group(rows: Rows) -> Rows:
    """Two responses of one token each: fewer than there are ranks."""
    pair = [row for row in rows if row["group_id"] == rows[0]["group_id"]][:2]
    short = [{**row, "response_token_ids": row["response_token_ids"][:1]} for row in pair]
    return [
        {**row, "sampler_log_probs": row["sampler_log_probs"][:1], "reward": float(index), "correct": bool(index)}
        for index, row in enumerate(short)
    ]


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(4, "batch.micro_tokens=64"), (2, "parallel.tensor=2"), (2, "parallel.pipeline=2"), (2, "parallel.context=2")],
    ids=["dp4", "tp2", "pp2", "cp2"],
)
@pytest.mark.parametrize("degenerate", [equally_right, equally_wrong, all_truncated, one_short_group])
def test_a_degenerate_batch_is_trained_on(
    degenerate: Callable[[Rows], Rows], ranks: int, layout: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", degenerate(read_jsonl(zoo.rollouts("uneven"))))
    overrides = [f"student.path={zoo.model('untied')}", f"teacher.path={zoo.model('teacher')}", f"run.dir={tmp_path}/run"]
    overrides += ["rollout=replay", f"rollout.path={tmp_path}/rows.jsonl", "objective.kd.mask=response", "optimizer.lr=0.01"]
    outcomes = pools[ranks].run(train_on_rank, [*overrides, *FAST, "trainer.steps=2", *layout.split()])
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].stderr
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped_updates"] for row in rows] == [0, 0]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    start, end = read_hf_weights(zoo.model("untied")), read_hf_weights(tmp_path / "run" / "hf")
    unchanged = all(torch.equal(weight, start[name]) for name, weight in end.items())
    assert unchanged == (degenerate is equally_right)

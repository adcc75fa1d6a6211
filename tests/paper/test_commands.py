"""Preflight, scoring and evaluation on paper CUDA, in a layout that splits everything that can be split."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from examples.tiny.make_pair import write_random_model
from tests.reference.dense import Settings
from tests.reference.tiny_models import write_jsonl
from tests.support.commands import (
    PREFLIGHT_CHECKS,
    assert_scores,
    evaluate_on_rank,
    evaluation_arguments,
    findings_on_rank,
    preflight_overrides,
    score_on_rank,
)
from tests.support.ranks import RankPool
from tests.support.zoo import TOKENS, Zoo


def test_scores_are_those_of_the_dense_reference(zoo: Zoo, paper2: RankPool, tmp_path: Path) -> None:
    result = zoo.reference("untied", "teacher", "uneven", Settings(beta=0.1, temperature=0.7, vocab_size=TOKENS))
    models = ["--model", str(zoo.model("untied")), "--teacher", str(zoo.model("teacher")), "--temperature", "0.7"]
    files = ["--input", str(zoo.rollouts("uneven")), "--output", str(tmp_path / "scored.jsonl")]
    layout = ["--tensor-parallel", "2", "--teacher-tensor-parallel", "1", "--teacher-pipeline-parallel", "2"]
    outcomes = paper2.run(score_on_rank, [*models, *files, *layout])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    scores: dict[str, list[torch.Tensor]] = {"log_probs": result.log_probs, "teacher_log_probs": result.teacher_log_probs}
    assert_scores(tmp_path / "scored.jsonl", scores)


def test_an_evaluation_counts_what_the_cpu_counts(ranks2: RankPool, paper2: RankPool, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", "student")
    write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i}+{i * i}=", "answer": str(i % 3)} for i in range(3)])
    found = []
    for pool, name in ((ranks2, "cpu"), (paper2, "gpu")):
        outcomes = pool.run(
            evaluate_on_rank, evaluation_arguments(tmp_path, name, "--tensor-parallel", "2", "--max-response-tokens", "20")
        )
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        found.append({key: value for key, value in metrics.items() if not key.startswith(("time/", "memory/"))})
    assert found[1] == pytest.approx(found[0])


def preflight_on_rank(overrides: list[str]) -> list[tuple[str, bool, str]]:
    """`findings_on_rank` with less data to reduce."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.preflight import machine

    with patch.dict(machine.ALL_REDUCE_BYTES, {"cuda": 1 << 20}):
        return findings_on_rank(overrides)


def test_the_preflight_finds_the_gpus_good(zoo: Zoo, paper2: RankPool, tmp_path: Path) -> None:
    overrides = [*preflight_overrides(zoo, tmp_path / "run"), "cluster.gpus_per_node=8"]
    for findings in paper2.run(preflight_on_rank, overrides):
        assert [(name, good) for name, good, _ in findings] == [(name, True) for name in PREFLIGHT_CHECKS], findings
        assert "H100" in next(text for name, _, text in findings if name == "devices")

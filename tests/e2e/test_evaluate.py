"""`tools/evaluate.py` and the evaluation of a training run: the same numbers, in every layout, and after an interruption."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import pytest

from examples.tiny.make_pair import write_random_model
from kdrl_mcore.reward.registry import AnswerReward
from kdrl_mcore.types import Rollout
from tests.ranks import RankPool
from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.training import FAST, Outcome, listen, metrics_of, train_on_rank

SAMPLES, PROMPTS, BLOCK = 3, 5, 2
REWARD = f"reward.kind={__name__}:LengthModulo"


class LengthModulo(AnswerReward):
    """The answer of a random model's response: its length modulo 3."""

    def __init__(self, config: Any) -> None:
        pass

    def answer(self, rollout: Rollout) -> str:
        return str(len(rollout.response_token_ids) % 3)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [left == right for left, right in pairs]


def evaluate_on_rank(arguments: list[str]) -> Outcome:
    """`tools/evaluate.py`, as the command line calls it, in the pool's world; `found["blocks"]`: how often it sampled."""
    import torch.distributed as dist

    from kdrl_mcore.parallel.platform import destroy_groups, prepare_platform

    prepare_platform()
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from tools.evaluate import main

    kept = set(dist.distributed_c10d._world.pg_map)
    with patch.object(MegatronEngine, "generate", autospec=True, side_effect=MegatronEngine.generate) as generate:
        outcome = listen(lambda: main(arguments))
    destroy_groups(kept)
    outcome.found = {"blocks": generate.call_count}
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_random_model(folder / "model", "student")
    rows = [{"prompt": f"{i}+{i * i}=", "answer": str(i % 3)} for i in range(PROMPTS)]
    write_jsonl(folder / "sums.jsonl", rows)
    return folder


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    files = ["--model", str(folder / "model"), "--data", str(folder / "sums.jsonl"), "--output", str(folder / output)]
    sizes = ["--samples", str(SAMPLES), "--max-response-tokens", "120", "--block", str(BLOCK)]
    return [*files, *sizes, "--temperature", "2.5", *more, "data.template=plain", REWARD]


def responses(folder: Path, output: str, mode: str) -> list[Any]:
    return [row for path in sorted((folder / output / "sums").glob(f"{mode}_*.jsonl")) for row in read_jsonl(path)]


@pytest.fixture(scope="module")
def whole(folder: Path, ranks2: RankPool) -> dict[str, float]:
    """The metrics of an uninterrupted evaluation on two tensor-parallel ranks."""
    outcomes = ranks2.run(evaluate_on_rank, arguments(folder, "whole", "--tensor-parallel", "2"))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert "avg@3" in outcomes[0].stdout and outcomes[1].stdout == ""
    assert outcomes[0].found["blocks"] == 2 * -(-PROMPTS // BLOCK)
    return json.loads((folder / "whole" / "metrics.json").read_text())


def test_the_numbers_are_those_of_the_responses_it_keeps(folder: Path, whole: dict[str, float]) -> None:
    rows = responses(folder, "whole", "sampled")
    groups = [rows[i : i + SAMPLES] for i in range(0, len(rows), SAMPLES)]
    assert [group[0]["prompt_id"] for group in groups] == [f"sums-{i + 1}" for i in range(PROMPTS)]
    assert [row["group_id"] for row in rows] == [i // SAMPLES for i in range(PROMPTS * SAMPLES)]
    lengths = [[len(row["response_token_ids"]) for row in group] for group in groups]
    right = [[length % 3 == i % 3 for length in each] for i, each in enumerate(lengths)]
    assert [[row["correct"] for row in group] for group in groups] == right
    majority = []
    for i, each in enumerate(lengths):
        votes = Counter(length % 3 for length in each)
        first = [vote for vote, count in votes.items() if count == max(votes.values())]
        majority.append((i % 3 in first) / len(first))
    expected = {
        "avg@3": fmean(map(fmean, right)),
        "pass@3": fmean(any(each) for each in right),
        "maj@3": fmean(majority),
        "greedy": fmean(row["correct"] for row in responses(folder, "whole", "greedy")),
        "response_length": fmean(map(fmean, lengths)),
        "truncated": fmean(row["finish_reason"] == "length" for row in rows),
    }
    assert 0 < expected["avg@3"] < 1 and len({length for each in lengths for length in each}) > 3
    assert {name: whole[f"eval/sums/{name}"] for name in expected} == pytest.approx(expected)
    assert whole["eval/accuracy"] == whole["eval/sums/avg@3"]
    assert whole["eval/accuracy_low"] <= whole["eval/accuracy"] <= whole["eval/accuracy_high"]


def test_an_interrupted_evaluation_samples_only_what_is_missing(
    folder: Path, whole: dict[str, float], ranks2: RankPool
) -> None:
    before = responses(folder, "whole", "sampled")
    (folder / "whole" / "sums" / "sampled_000002.jsonl").unlink()
    (folder / "whole" / "metrics.json").unlink()
    # The layout may change in between: two replicas now, not two shards of one.
    outcomes = ranks2.run(evaluate_on_rank, arguments(folder, "whole"))
    assert [(outcome.code, outcome.found["blocks"]) for outcome in outcomes] == [(0, 1), (0, 1)], outcomes[0].stderr
    assert [row["response_token_ids"] for row in responses(folder, "whole", "sampled")] == [
        row["response_token_ids"] for row in before
    ]
    assert json.loads((folder / "whole" / "metrics.json").read_text()) == whole


def test_training_evaluates_with_the_same_numbers(folder: Path, whole: dict[str, float], ranks2: RankPool) -> None:
    overrides = [
        *("objective=grpo", "trainer.steps=0", "eval.at_start=true", f"eval.samples={SAMPLES}", f"eval.block={BLOCK}"),
        *(f"student.path={folder}/model", f"data.train={folder}/sums.jsonl", f"data.eval={folder}/sums.jsonl"),
        *("data.template=plain", "eval.temperature=2.5", "rollout.max_response_tokens=120", REWARD),
        *("parallel.pipeline=2", f"run.dir={folder}/run", "checkpoint.export_hf=false", *FAST),
    ]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    (metrics,) = metrics_of(folder / "run")
    assert {name: value for name, value in metrics.items() if name.startswith("eval/")} == pytest.approx(whole)
    kept = folder / "run" / "evaluation" / "step_000000" / "sums" / "sampled_000001.jsonl"
    assert [row["response_token_ids"] for row in read_jsonl(kept)] == [
        row["response_token_ids"] for row in responses(folder, "whole", "sampled")[: BLOCK * SAMPLES]
    ]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--seed", "2"], 1, "other settings, seed was 1 and is now 2"),
        (["--top-p", "0.9"], 1, "rollout.top_p was 1.0 and is now 0.9"),
        (["rollout=vllm"], 1, 'rollout.engine was "megatron" and is now "vllm"'),
        (["--benchmarks", "aime42"], 2, "no such benchmark 'aime42'"),
        (["--benchmarks", "[]"], 2, "Cannot convert"),
        (["--samples", "0"], 2, "eval.samples=0"),
        (["--tensor-parallel", "3"], 2, "3"),
        (["reward.kind=nothing"], 2, "reward.kind=nothing"),
        (["rollout=replay", "rollout.path=x"], 2, "rollout.engine=replay samples nothing"),
        (["--model", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, whole: dict[str, float], ranks1: RankPool, more: list[str], code: int, words: str
) -> None:
    command = [*arguments(folder, "whole"), *more]
    if more[0].startswith("reward"):
        command = [each for each in command if each != REWARD]
    (outcome,) = ranks1.run(evaluate_on_rank, command)
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == code and line.startswith("error: ") and words in line

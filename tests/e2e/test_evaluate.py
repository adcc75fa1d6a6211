"""`tools/evaluate.py` and the evaluation in a training run give the same numbers, in every layout and after an interruption."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from examples.tiny.make_pair import write_random_model
from kdrl_mcore.cli.evaluate import output_name
from kdrl_mcore.convert.folders import find_model
from tests.reference.tiny_models import read_jsonl, write_jsonl
from tests.support.commands import BLOCK, REWARD, SAMPLES, evaluate_on_rank, evaluation_arguments
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank

PROMPTS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_random_model(folder / "model", "student")
    rows = [{"prompt": f"{i}+{i * i}=", "answer": str(i % 3)} for i in range(PROMPTS)]
    write_jsonl(folder / "sums.jsonl", rows)
    return folder


def responses(folder: Path, output: str, mode: str) -> list[Any]:
    return [row for path in sorted((folder / output / "sums").glob(f"{mode}_*.jsonl")) for row in read_jsonl(path)]


@pytest.fixture(scope="module")
def whole(folder: Path, ranks2: RankPool) -> dict[str, float]:
    """The metrics of an uninterrupted evaluation on two tensor-parallel ranks."""
    outcomes = ranks2.run(evaluate_on_rank, evaluation_arguments(folder, "whole", "--tensor-parallel", "2"))
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
    # The layout may change in between: now there are two replicas, not two shards of one.
    outcomes = ranks2.run(evaluate_on_rank, evaluation_arguments(folder, "whole"))
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


def test_a_run_and_its_checkpoint_are_models(folder: Path, whole: dict[str, float], ranks2: RankPool) -> None:
    """A run's export, its training checkpoint and the run itself give the same responses, which differ from the initial
    student's."""
    overrides = [
        *("objective=grpo", "trainer.steps=1", "optimizer.lr=0.01", "checkpoint.every=1", "eval.every=-1", "parallel.tensor=2"),
        *(f"student.path={folder}/model", f"data.train={folder}/sums.jsonl", f"run.dir={folder}/trained", REWARD),
        *("data.template=plain", "rollout.prompts_per_step=2", "rollout.responses_per_prompt=4", "trainer.self_test=false"),
        *("logging.progress=false", "logging.tensorboard=false", "rollout.temperature=2.5"),
    ]
    outcomes = ranks2.run(train_on_rank, overrides)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    found = {}
    for name, path in {"run": "trained", "export": "trained/hf", "checkpoint": "trained/checkpoints/latest"}.items():
        command = [*evaluation_arguments(folder, name, "--tensor-parallel", "2"), "--model", f"{folder}/{path}", "--no-greedy"]
        outcomes = ranks2.run(evaluate_on_rank, command)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        said = [f"evaluating {folder}/trained/hf"] if name == "run" else []
        assert [outcome.stderr.splitlines() for outcome in outcomes] == [said, []]
        found[name] = [row["response_token_ids"] for row in responses(folder, name, "sampled")]
    assert found["run"] == found["export"] == found["checkpoint"]
    assert found["run"] != [row["response_token_ids"] for row in responses(folder, "whole", "sampled")]


def test_a_run_without_an_export_is_its_latest_checkpoint(tmp_path: Path) -> None:
    for name in ("step_000001/model", "step_000002/model"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "config.json").touch()
    (tmp_path / "run" / "checkpoints" / "latest").symlink_to("step_000002")
    latest = (tmp_path / "run" / "checkpoints" / "step_000002").resolve()
    assert find_model(tmp_path / "run") == find_model(tmp_path / "run" / "checkpoints") == latest
    assert find_model(latest) == latest
    (tmp_path / "run" / "hf").mkdir()
    (tmp_path / "run" / "hf" / "config.json").touch()
    assert find_model(tmp_path / "run") == (tmp_path / "run" / "hf").resolve()
    for other in (tmp_path, tmp_path / "none"):
        assert find_model(other) == other


def test_two_models_have_two_folders(tmp_path: Path) -> None:
    models = [tmp_path / name for name in ("one/hf", "two/hf", "two/deep/hf", "more/two/hf", "two-hf", "checkpoints/step_1")]
    names = [output_name(model) for model in models]
    assert len(set(names)) == len(models) and names[0].startswith("one-hf-")
    assert names == [output_name(model) for model in models]


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--seed", "2"], 1, "other settings, seed was 1 and is now 2"),
        (
            ["--max-response-tokens", "254"],
            1,
            "sums row 5: a prompt of 5 tokens and eval.max_response_tokens=254 exceed the 256",
        ),
        (["--top-p", "0.9"], 1, "eval.top_p was null and is now 0.9"),
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
    command = [*evaluation_arguments(folder, "whole"), *more]
    if more[0].startswith("reward"):
        command = [each for each in command if each != REWARD]
    (outcome,) = ranks1.run(evaluate_on_rank, command)
    (line,) = outcome.stderr.splitlines()
    assert outcome.code == code and line.startswith("error: ") and words in line

"""Training on several domains: each has its verifier, is mixed by weight and counted separately, and resumes without a
difference."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.reference.tiny_models import make_pair, read_jsonl, write_jsonl
from tests.support.ranks import RankPool
from tests.support.training import FAST, PROMPTS, metrics_of, steps_of, train_on_rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_pair(tmp_path_factory.mktemp("domains"), PROMPTS)
    rows = read_jsonl(folder / "train.jsonl")
    write_jsonl(
        folder / "sums.jsonl", [{**row, "response": "1", "info": {"level": index}} for index, row in enumerate(rows[:5])]
    )
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows[5:]]
    rest = {"gold": {"it": "B"}, "response": "2", "info": {"level": 7.5}}
    write_jsonl(folder / "quiz.jsonl", [{"question": question, **rest} for question in asked])
    return folder


def train(pool: RankPool, folder: Path, run: Path, steps: int, *overrides: str) -> list[str]:
    """Train; returns what rank 0 logged."""
    quiz = "{path: %s, weight: 2, reward: multiple_choice, prompt_key: question, answer_key: gold.it}"
    sources = f"[{{path: {folder / 'sums.jsonl'}, name: plus}}, {quiz % (folder / 'quiz.jsonl')}]"
    common = [
        *(f"run.dir={run}", f"trainer.steps={steps}", f"student.path={folder / 'student'}", "data.template=plain"),
        *(f"data.sources={sources}", "reward=exact_match", "reward.workers=1", "objective=grpo", "rollout.prompts_per_step=3"),
        *(
            "rollout.responses_per_prompt=2",
            "rollout.max_response_tokens=6",
            "trainer.deterministic=true",
            "checkpoint.every=0",
        ),
        *(each for each in FAST if not each.startswith("checkpoint")),
        *("data.columns=[info.level]", "reward.terms=[{kind: 'tests.support.rewards:needs_column'}]", "eval.every=-1"),
    ]
    outcomes = pool.run(train_on_rank, [*common, *overrides])
    assert [outcome.code for outcome in outcomes] == [0] * pool.world_size, outcomes[0].stderr
    return outcomes[0].log


def test_two_domains(folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(ranks2, folder, whole, 3)
    train(ranks2, folder, parts, 1)
    train(ranks2, folder, parts, 3)
    assert steps_of(parts) == steps_of(whole)
    domains: Counter[str] = Counter()
    for step, metrics in enumerate(metrics_of(whole), start=1):
        rows = read_jsonl(whole / "rollouts" / f"step_{step:06d}.jsonl")
        domains.update(row["domain"] for row in rows)
        for name in ("plus", "quiz"):
            own = [row for row in rows if row["domain"] == name]
            lengths = [len(row["response_token_ids"]) for row in own]
            assert metrics[f"domain/{name}/samples"] == len(own)
            assert metrics[f"domain/{name}/response_length"] == pytest.approx(sum(lengths) / len(own))
            assert metrics[f"domain/{name}/reward"] == pytest.approx(sum(row["reward"] for row in own) / len(own))
            levels = {row["reward"] for row in own}  # no answer is right: the reward comes from the column
            assert levels == {7.5} if name == "quiz" else levels <= {0.0, 1.0, 2.0, 3.0, 4.0}
            assert all(row["prompt_id"].startswith({"plus": "sums-", "quiz": "quiz-"}[name]) for row in own)
    assert domains == {"plus": 6, "quiz": 12}
    replayed = tmp_path / "replayed"
    file = whole / "rollouts" / "step_000001.jsonl"
    train(ranks2, folder, replayed, 1, "rollout=replay", f"rollout.path={file}", "checkpoint.every=-1")
    first, again = metrics_of(whole)[0], metrics_of(replayed)[0]
    assert {name: again[name] for name in first if name.startswith("domain/")} == {
        name: value for name, value in first.items() if name.startswith("domain/")
    }


def test_supervised_domains(folder: Path, ranks2: RankPool, tmp_path: Path) -> None:
    evaluation = (f"data.eval={folder / 'sums.jsonl'}", "eval.every=0", "eval.greedy=false", "eval.max_prompts=2")
    log = train(ranks2, folder, tmp_path, 2, "objective=sft", "checkpoint.every=-1", *evaluation)
    assert f"sums: 2 of its 2 prompts are also trained on ({folder}/sums.jsonl; the first is sums-1)" in " ".join(log)
    assert [(row["domain/plus/samples"], row["domain/quiz/samples"]) for row in metrics_of(tmp_path)] == [(1.0, 2.0)] * 2

"""One training step of a mixture of experts equals that of the dense reference, router included, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference.tiny_models import make_model, make_qwen2, make_rollouts, make_tokenizer, write_jsonl
from tests.support import conversion_ranks
from tests.support.expert_training import Probe, check, make_probe
from tests.support.ranks import RankPool
from tests.support.sampling import PROMPTS, generate_on_rank, generate_with_packed_weights, tokens_of


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    folder = tmp_path_factory.mktemp("experts")
    student = make_model("qwen3_moe", folder / "student", seed=11, vocab_size=64)
    return make_probe(folder, student, make_qwen2(folder / "teacher", seed=12, vocab_size=64))


def test_on_one_rank(probe, ranks1: RankPool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check(probe, ranks1, [], tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.expert=2"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert=2"],
    ],
    ids=["dp2-ep2", "tp2-sp-ep1", "tp2-sp-ep2"],
)
def test_on_two_ranks(probe, layout: list[str], ranks2: RankPool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check(probe, ranks2, layout, tmp_path)


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.pipeline=2", "parallel.expert=2"],
        ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert=4"],
    ],
    ids=["dp2-pp2-ep2", "dp2-tp2-sp-ep4"],
)
def test_on_four_ranks(probe, layout: list[str], ranks4: RankPool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    check(probe, ranks4, layout, tmp_path)


def test_a_teacher_with_its_experts_spread(ranks2: RankPool, tmp_path: Path) -> None:
    student = make_qwen2(tmp_path / "student", seed=11, vocab_size=64)
    teacher = make_model("qwen3_moe", tmp_path / "teacher", seed=12, vocab_size=64)
    check(make_probe(tmp_path, student, teacher), ranks2, ["teacher.parallel.expert=2"], tmp_path / "run")


def test_experts_and_tensor_parallelism_without_sequence_parallelism_are_refused(
    probe,  # type: ignore[no-untyped-def]
    ranks2: RankPool,
    tmp_path: Path,
) -> None:
    codes = ranks2.run(conversion_ranks.train, [*probe[2], "parallel.tensor=2", f"run.dir={tmp_path}"])
    assert codes == [2, 2]


@pytest.mark.parametrize("prompts", [1, 3], ids=["a replica without prompts", "uneven replicas"])
def test_experts_spread_over_replicas_sample_the_same_tokens(
    prompts: int, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """Replicas that finish early continue to serve the others with their experts."""
    student = make_model("qwen3_moe", tmp_path / "student", seed=11)
    make_tokenizer(student)
    rollouts = write_jsonl(tmp_path / "rollouts.jsonl", make_rollouts(student, seed=13, vocab_size=60))
    overrides = [
        f"student.path={student}",
        "rollout=replay",
        f"rollout.path={rollouts}",
        "objective=grpo",
        "rollout.max_sequences=3",
    ]
    samplings = {"plain": {"temperature": 1.0, "top_p": 1.0}}
    given = [overrides, PROMPTS[:prompts], samplings]
    (alone,) = ranks1.run(generate_on_rank, *given)
    for spread in ranks2.run(generate_on_rank, [*overrides, "parallel.expert=2"], *given[1:]):
        assert tokens_of(spread) == tokens_of(alone)
        assert prompts == 1 or len({len(row["response_token_ids"]) for row in spread["plain"]}) > 1
        for one, other in zip(alone["plain"], spread["plain"], strict=True):
            assert one["sampler_log_probs"] == pytest.approx(other["trainer_log_probs"], abs=1e-4)
    (packed, copies, left), _ = ranks2.run(generate_with_packed_weights, [*overrides, "parallel.expert=2"], *given[1:])
    assert tokens_of(packed) == tokens_of(alone) and copies > 4 and left == 0

"""The core rows of the matrix on a newer Megatron-Core, which `make setup` installs next to the default one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_mcore.convert.convert import import_hf
from tests.reference.tiny_models import make_model, make_qwen2
from tests.support import conversion_ranks, expert_training
from tests.support.agreement import JOINT, Case, StudentLayout, case, check, check_adam
from tests.support.checkpoint_shares import PATIENCE, SMALL_BUCKETS, differing_tensors, save_on_rank
from tests.support.hf_folders import quiet
from tests.support.late_weights import OVERLAPPED
from tests.support.newer_core import BESIDE, assert_newer, needs_newer_core
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank
from tests.support.zoo import Zoo

EXACT = replace(JOINT, estimator="exact")

pytestmark = needs_newer_core

ROWS = {
    "tp2, teacher pp2": case(StudentLayout(2, 1, 1, 1), JOINT),
    "tp2 sp, teacher pp2": case(StudentLayout(2, 1, 1, 1, sequence_parallel=True), EXACT),
    "pp2, teacher tp2": case(StudentLayout(1, 2, 1, 1), EXACT),
    "pp2 interleaved": case(StudentLayout(1, 2, 1, 1, virtual_pipeline=2), JOINT),
    "pp2, all modules recomputed": Case(
        2,
        "parallel.pipeline=2 batch.micro_tokens=40 parallel.recompute=selective "
        "parallel.recompute_modules=[core_attn,layernorm,mlp]",
    ),
    "cp2": case(StudentLayout(1, 1, 2, 1), EXACT),
    "dp2": case(StudentLayout(1, 1, 1, 2), JOINT),
    "tied, pp2": replace(case(StudentLayout(1, 2, 1, 1), JOINT), student="tied"),
    "tp2, masked top-k": case(StudentLayout(2, 1, 1, 1), replace(JOINT, estimator="top_k_unbiased", top_k=5, mask="response")),
}


@pytest.fixture(scope="module")
def newer_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Ranks that would wait forever for a compilation that was killed, if they compiled Megatron-Core's extension."""
    lock = tmp_path_factory.mktemp("extensions") / "share_storage_ext" / "lock"
    lock.parent.mkdir()
    lock.touch()
    pool = RankPool(2, import_first=[str(BESIDE)])
    pool.run(use_extensions_of, str(lock.parents[1]))
    yield pool
    pool.close()


def use_extensions_of(folder: str) -> None:
    """On a rank: torch keeps what it compiles in this folder."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_core_rows(row: Case, zoo: Zoo, newer_ranks: RankPool, tmp_path: Path) -> None:
    check(row, zoo, newer_ranks, tmp_path)
    assert_newer(newer_ranks)


@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", "", f"parallel.context=2 {OVERLAPPED}"], ids=["tp2", "dp2", "cp2 overlapped"]
)
def test_two_steps_of_adam(layout: str, zoo: Zoo, newer_ranks: RankPool, tmp_path: Path) -> None:
    check_adam(2, layout, True, zoo, newer_ranks, tmp_path)
    assert_newer(newer_ranks)


@pytest.mark.parametrize(
    ("saved_by", "settings"),
    [
        ("older", ""),
        ("newer", ""),
        ("newer", "parallel.tensor=2"),
        ("older", "parallel.distributed_optimizer=false"),
        ("newer", "optimizer.name=sgd parallel.pipeline=2"),
    ],
    ids=["older dp2", "newer dp2", "newer tp2", "older not distributed", "newer sgd pp2"],
)
def test_a_checkpoint_of_one_version_goes_on_in_the_other(
    settings: str, saved_by: str, zoo: Zoo, ranks2: RankPool, newer_ranks: RankPool, tmp_path: Path
) -> None:
    first, second = (ranks2, newer_ranks) if saved_by == "older" else (newer_ranks, ranks2)
    models = (f"student.path={zoo.model('untied')}", f"teacher.path={zoo.model('teacher')}", "optimizer.lr=0.01")
    replay = ("rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", "optimizer.adam_eps=1e-3", "objective.beta.init=0.5")
    overrides = [*models, *replay, *FAST, "checkpoint.export_hf=false", *settings.split()]

    def train(pool: RankPool, run: str, steps: int, every: int) -> None:
        words = [*overrides, f"run.dir={tmp_path}/{run}", f"trainer.steps={steps}", f"checkpoint.every={every}"]
        outcomes = pool.run(train_on_rank, words)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr + outcomes[1].stderr

    train(first, "straight", 4, -1)
    train(first, "parted", 2, 0)
    train(second, "parted", 4, -1)
    assert_newer(newer_ranks)
    straight, parted = metrics_of(tmp_path / "straight"), metrics_of(tmp_path / "parted")
    for name in ("loss", "grad_norm", "kl", "lr"):
        assert [row[name] for row in parted] == pytest.approx([row[name] for row in straight], rel=1e-5), name
    assert len({row["loss"] for row in parted}) == 4  # each update, with or without moments, changes the loss


@pytest.mark.timeout(1800)  # saves start processes
def test_checkpoints_hold_the_same_bits_in_both_versions(
    zoo: Zoo, ranks2: RankPool, newer_ranks: RankPool, tmp_path: Path
) -> None:
    """What each version saves from one state, and what the newer version loads from the older one's checkpoint in another
    layout. Each rank saves what it holds; nothing is gathered."""

    def save(pool: RankPool, overrides: str, name: str, *more: object) -> None:
        found = pool.run(save_on_rank, str(zoo.model("tied")), overrides, f"{tmp_path}/{name}", *more, timeout=PATIENCE)
        for written, state, new_saving, new_loading in found:
            assert more or (new_saving == new_loading == 0 and state < written < 1.8 * state)

    save(ranks2, SMALL_BUCKETS, "older")
    save(newer_ranks, SMALL_BUCKETS, "newer")
    save(newer_ranks, "parallel.tensor=2", "moved", f"{tmp_path}/older/step_000001")
    folders = [f"{tmp_path}/{name}" for name in ("older", "newer", "moved")]
    assert newer_ranks.run(differing_tensors, *folders, timeout=PATIENCE)[0] == []
    assert_newer(newer_ranks)


@pytest.mark.parametrize(
    "family, layout",
    [("qwen2", {"tensor": 2}), ("olmo2", {"tensor": 2}), ("gemma3", {"tensor": 2}), ("glm4_moe", {"expert": 2})],
)
def test_it_loads_a_converted_model(family: str, layout: dict[str, int], newer_ranks: RankPool, tmp_path: Path) -> None:
    hf = make_model(family, tmp_path / "hf", seed=4)
    import_hf(hf, tmp_path / "megatron", None, quiet)
    assert all(newer_ranks.run(conversion_ranks.megatron_loads_the_same, str(hf), str(tmp_path / "megatron"), layout))
    assert_newer(newer_ranks)


def test_experts_train(newer_ranks: RankPool, tmp_path: Path) -> None:
    student = make_model("glm4_moe", tmp_path / "student", seed=11, vocab_size=64)
    probe = expert_training.make_probe(tmp_path, student, make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64))
    layout = ["parallel.tensor=2", "parallel.sequence_parallel=true", "parallel.expert=2"]
    expert_training.check(probe, newer_ranks, layout, tmp_path / "run")
    assert_newer(newer_ranks)


def test_a_run_goes_on_with_a_newer_version_and_another_learning_rate(
    zoo: Zoo, ranks2: RankPool, newer_ranks: RankPool, tmp_path: Path
) -> None:
    """0.19 identifies parameter groups by their learning rates, too."""
    job = ["objective=grpo", "rollout=replay", f"rollout.path={zoo.rollouts('uneven')}", f"student.path={zoo.model('untied')}"]
    job += [word for word in FAST if not word.startswith("checkpoint.every")] + ["checkpoint.keep=0", f"run.dir={tmp_path}/run"]
    starts = [
        (ranks2, "optimizer.lr=0.001"),
        (newer_ranks, "optimizer.lr=0.002"),
        (newer_ranks, "optimizer.lr=0.003 parallel.distributed_optimizer=false"),
    ]
    for steps, (pool, words) in enumerate(starts, 1):
        outcome, _ = pool.run(train_on_rank, [*job, *words.split(), f"trainer.steps={steps}"])
        assert outcome.code == 0, outcome.stderr
        assert steps == 1 or any(line.endswith(f"after step {steps - 1}") for line in outcome.log)
    assert [row["lr"] for row in metrics_of(tmp_path / "run")] == [0.001, 0.002, 0.003]
    assert_newer(newer_ranks)
    outcome, _ = ranks2.run(train_on_rank, [*job, "optimizer.lr=0.001", "trainer.steps=4"])
    assert outcome.code == 0, outcome.stderr
    assert metrics_of(tmp_path / "run")[-1]["lr"] == 0.001


def test_what_only_a_later_version_reads_is_told(ranks1: RankPool, tmp_path: Path) -> None:
    """Checkpoints from 0.19 before it also wrote the state that all ranks share in 0.16's form."""
    (reason,) = ranks1.run(why_unreadable, str(tmp_path))
    assert reason is not None and "was written by Megatron-Core 0.19 or later, but 0.16" in reason
    (tmp_path / "common.pt").touch()
    assert ranks1.run(why_unreadable, str(tmp_path)) == [None]


def why_unreadable(weights: str) -> str | None:
    """`mcore.why_unreadable` on a rank."""
    from kdrl_mcore.parallel import mcore

    return mcore.why_unreadable(Path(weights))

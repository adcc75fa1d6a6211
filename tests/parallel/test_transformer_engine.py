"""With Transformer Engine's layers, imitated by `tests/support/stubs`, everything is as with Megatron-Core's: loss, log-probs,
gradients (which the layers add to the main gradients themselves), optimizer, weights from and to Hugging Face files, refit, and
checkpoints, which load from one kind of layers into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_mcore.convert.convert import import_hf
from tests.reference.tiny_models import make_model, make_qwen2, read_hf_weights
from tests.support import conversion_ranks, expert_training
from tests.support.agreement import Case, assert_gradients, check, check_adam, overrides_of
from tests.support.hf_folders import quiet
from tests.support.late_weights import OVERLAPPED
from tests.support.newer_core import BESIDE, assert_newer, needs_newer_core
from tests.support.ranks import RankPool
from tests.support.te_ranks import (
    STUBS,
    attention_on_rank,
    modules_on_rank,
    play_transformer_engine,
    refit_on_rank,
    under_te_on_rank,
    updates_on_rank,
)
from tests.support.training import metrics_of, train_on_rank
from tests.support.zoo import Zoo


@pytest.fixture(scope="module")
def te_ranks() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[STUBS], prepare=play_transformer_engine)
    yield pool
    pool.close()


TE = "model.spec=transformer_engine"
"""In float32 this is not the default."""
SEQUENCE_PARALLEL = "parallel.tensor=2 parallel.sequence_parallel=true"
ROWS = {
    "tp2": Case(2, "parallel.tensor=2", student="one_kv_head"),
    "tp2 sp": Case(2, f"{SEQUENCE_PARALLEL} parallel.recompute=full batch.micro_tokens=40"),
    "tied, pp2 interleaved": Case(2, "parallel.pipeline=2 parallel.virtual_pipeline=2 batch.micro_tokens=40", student="tied"),
    "cp2": Case(2, "parallel.context=2"),
    "tp2 sp, attention and MLP recomputed": Case(
        2, f"{SEQUENCE_PARALLEL} parallel.recompute=selective parallel.recompute_modules=[core_attn,mlp]"
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_loss_log_probs_and_gradients_are_those_of_the_dense_reference(
    row: Case, zoo: Zoo, te_ranks: RankPool, tmp_path: Path
) -> None:
    check(replace(row, overrides=f"{row.overrides} {TE}"), zoo, te_ranks, tmp_path)


@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, f"{OVERLAPPED} batch.micro_tokens=40"], ids=["tp2 sp", "dp2 overlapped"])
def test_two_steps_of_its_adam_are_those_of_torch(layout: str, zoo: Zoo, te_ranks: RankPool, tmp_path: Path) -> None:
    check_adam(2, f"{layout} {TE}", True, zoo, te_ranks, tmp_path)


@pytest.mark.parametrize("student", ["untied", "tied"])
def test_the_layers_add_their_weights_gradients_to_the_main_gradient(
    student: str, zoo: Zoo, te_ranks: RankPool, tmp_path: Path
) -> None:
    for outcome in te_ranks.run(
        updates_on_rank, [*overrides_of(zoo, tmp_path, student), "parallel.pipeline=2", "trainer.steps=1", TE]
    ):
        assert outcome.code == 0, outcome.stderr
        for name, by_layer in outcome.found.items():
            assert by_layer == (".linear_" in name and name.endswith(".weight")), name


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "olmo2", "gemma3"])
@pytest.mark.parametrize("layout", [SEQUENCE_PARALLEL, "parallel.expert=2"], ids=["tp2 sp", "ep2"])
def test_norms_of_every_kind_and_grouped_experts_train(family: str, layout: str, te_ranks: RankPool, tmp_path: Path) -> None:
    if family != "qwen3_moe" and "expert" in layout:
        layout = "batch.micro_tokens=32"
    student = make_model(family, tmp_path / "student", seed=11, vocab_size=64)
    teacher = make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
    probe = expert_training.make_probe(tmp_path, student, teacher)
    expert_training.check(probe, te_ranks, [*layout.split(), TE], tmp_path / "run")


@pytest.mark.parametrize("modules", ["moe_act", "layernorm,moe", "core_attn,layernorm,moe_act"])
def test_grouped_experts_recompute(modules: str, te_ranks: RankPool, tmp_path: Path) -> None:
    student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
    teacher = make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
    probe = expert_training.make_probe(tmp_path, student, teacher)
    recompute = ["parallel.recompute=selective", f"parallel.recompute_modules=[{modules}]"]
    expert_training.check(probe, te_ranks, ["parallel.expert=2", *recompute, TE], tmp_path / "run")


@pytest.mark.parametrize("tensor", [1, 2])
def test_attention_over_packed_sequences_is_ours(tensor: int, zoo: Zoo, te_ranks: RankPool) -> None:
    for distances in te_ranks.run(attention_on_rank, str(zoo.model("untied")), tensor):
        assert max(distances) < 1e-5


@pytest.mark.parametrize(
    "family, layout",
    [("qwen3", {"tensor": 2}), ("olmo2", {"tensor": 2}), ("gemma3", {"tensor": 2}), ("qwen3_moe", {"expert": 2})],
)
def test_weights_come_and_go_to_the_byte(family: str, layout: dict[str, int], te_ranks: RankPool, tmp_path: Path) -> None:
    hf = make_model(family, tmp_path / "hf", seed=4)
    (modules, _) = te_ranks.run(under_te_on_rank, modules_on_rank, str(hf), layout)
    linear = "TEColumnParallelLinear" if family == "olmo2" else "TELayerNormColumnParallelLinear"
    assert modules["decoder.layers.0.self_attention.linear_qkv"] == linear
    assert te_ranks.run(under_te_on_rank, refit_on_rank, str(hf), layout) == [[], []]
    te_ranks.run(
        under_te_on_rank, conversion_ranks.export_and_save, str(hf), layout, str(tmp_path / "exported"), str(tmp_path / "saved")
    )
    before, after = read_hf_weights(hf), read_hf_weights(tmp_path / "exported")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    import_hf(hf, tmp_path / "megatron", None, quiet)
    assert all(
        te_ranks.run(under_te_on_rank, conversion_ranks.megatron_loads_the_same, str(hf), str(tmp_path / "megatron"), layout)
    )


@pytest.mark.parametrize("first, then", [("local", "te"), ("te", "local")], ids=["from local", "to local"])
def test_a_run_goes_on_under_the_other_layers(
    first: str, then: str, zoo: Zoo, te_ranks: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    kinds = {"te": (te_ranks, TE), "local": (ranks2, "model.spec=local")}
    settings = ("optimizer.lr=0.01", "optimizer.adam_eps=1e-3", "checkpoint.every=1", SEQUENCE_PARALLEL)

    def train(kind: str, run: str, steps: int) -> dict[str, Any]:
        pool, spec = kinds[kind]
        run_overrides = overrides_of(zoo, tmp_path / run, "untied")
        outcomes = pool.run(train_on_rank, [*run_overrides, *" ".join(settings).split(), f"trainer.steps={steps}", spec])
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
        return {name: weight.double() for name, weight in read_hf_weights(tmp_path / run / "hf").items()}

    whole = train("local", "whole", 2)
    halfway = train(first, "run", 1)
    ended = train(then, "run", 2)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    assert_gradients({name: ended[name] - halfway[name] for name in ended}, {n: whole[n] - halfway[n] for n in whole})


@needs_newer_core
def test_a_newer_megatron_core_makes_the_same_of_it(tmp_path: Path) -> None:
    pool = RankPool(2, import_first=[STUBS, str(BESIDE)], prepare=play_transformer_engine)
    try:
        student = make_model("qwen3_moe", tmp_path / "student", seed=11, vocab_size=64)
        teacher = make_qwen2(tmp_path / "teacher", seed=12, vocab_size=64)
        probe = expert_training.make_probe(tmp_path, student, teacher)
        expert_training.check(probe, pool, [*SEQUENCE_PARALLEL.split(), TE], tmp_path / "run")
        assert_newer(pool)
    finally:
        pool.close()

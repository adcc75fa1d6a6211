"""One training step of a mixture of experts equals that of the dense reference, router included, in every layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference.dense import load_model
from tests.reference.tiny_models import (
    make_model,
    make_qwen2,
    make_rollouts,
    make_tokenizer,
    read_hf_weights,
    read_jsonl,
    write_jsonl,
)
from tests.support import conversion_ranks
from tests.support.expert_training import CORRECTION_BIAS, Probe, check, make_probe
from tests.support.ranks import RankPool
from tests.support.sampling import PROMPTS, generate_on_rank, generate_with_packed_weights, tokens_of

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "qwen3_moe, some dense": {"mlp_only_layers": [1]},
    "glm4_moe": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
}


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Probe]:
    folder = tmp_path_factory.mktemp("experts")
    teacher = make_qwen2(folder / "teacher", seed=12, vocab_size=64)
    made = {}
    for number, (name, settings) in enumerate(FAMILIES.items()):
        family, _, _ = name.partition(",")
        student = make_model(family, folder / str(number) / "student", seed=11, vocab_size=64, **settings)
        made[name] = make_probe(folder / str(number), student, teacher)
    return made


@pytest.fixture(scope="module")
def probe(probes: dict[str, Probe]) -> Probe:
    return probes["qwen3_moe"]


def test_on_one_rank(probes: dict[str, Probe], ranks1: RankPool, tmp_path: Path) -> None:
    check(probes["qwen3_moe, some dense"], ranks1, [], tmp_path)


TP2_SP = "parallel.tensor=2 parallel.sequence_parallel=true"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_moe", "parallel.expert=2"),
        ("qwen3_moe, some dense", TP2_SP),
        ("qwen3_moe", f"{TP2_SP} parallel.expert=2"),
        ("glm4_moe", f"{TP2_SP} parallel.expert=2"),
        ("glm4_moe", "parallel.context=2 parallel.expert=2 parallel.recompute=full"),
    ],
)
def test_on_two_ranks(name: str, layout: str, probes: dict[str, Probe], ranks2: RankPool, tmp_path: Path) -> None:
    check(probes[name], ranks2, layout.split(), tmp_path)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_moe, some dense", "parallel.pipeline=2 parallel.expert=2"),
        ("qwen3_moe", f"{TP2_SP} parallel.expert=4"),
        ("glm4_moe", "parallel.pipeline=2 parallel.expert=2"),
    ],
)
def test_on_four_ranks(name: str, layout: str, probes: dict[str, Probe], ranks4: RankPool, tmp_path: Path) -> None:
    check(probes[name], ranks4, layout.split(), tmp_path)


def test_correction_biases_follow_the_load_if_asked(probes: dict[str, Probe], ranks2: RankPool, tmp_path: Path) -> None:
    """Each moves by the rate: up if its expert got fewer tokens than the mean, down if more. A skipped update moves none."""
    student, _, overrides = probes["glm4_moe"]
    words = ["parallel.expert=2", "model.router_bias_update=0.01", f"run.dir={tmp_path}"]
    assert ranks2.run(conversion_ranks.train, [*overrides, *words], timeout=250) == [0, 0]
    model = load_model(student)
    loads: dict[str, torch.Tensor] = {}

    def count(module: Any, _: Any, output: tuple[Any, ...], name: str) -> None:
        loads[name] = loads.get(name, 0) + torch.bincount(output[2].flatten(), minlength=8)

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(partial(count, name=f"{name}.{CORRECTION_BIAS}"))
    for row in read_jsonl(student.parent / "rollouts.jsonl"):
        model(torch.tensor([[*row["prompt_token_ids"], *row["response_token_ids"]]]))
    before, after = read_hf_weights(student), read_hf_weights(tmp_path / "hf")
    assert len(loads) == 3
    for name, load in loads.items():
        expected = before[name] + 0.01 * torch.sign(load.float().mean() - load)
        torch.testing.assert_close(after[name], expected, msg=name)
    words = [*words[:2], "fault.kind=nan", "fault.phase=train", "fault.step=1", "fault.rank=1", f"run.dir={tmp_path}/skipped"]
    assert ranks2.run(conversion_ranks.train, [*overrides, *words], timeout=250) == [0, 0]
    skipped = read_hf_weights(tmp_path / "skipped" / "hf")
    assert all(torch.equal(before[name], skipped[name]) for name in before)


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

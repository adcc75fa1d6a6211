"""One training step of a mixture of experts is that of the dense reference, router included, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.convert import worker
from tests.parallel.test_engine import PROMPTS, generate_on_rank, tokens_of
from tests.ranks import RankPool
from tests.reference.dense import Settings, kdrl
from tests.reference.tiny_models import make_model, make_qwen2, make_rollouts, make_tokenizer, read_hf_weights, write_jsonl

LEARNING_RATE = 0.5
SETTINGS = Settings(alpha=1.0, beta=0.1, estimator="k2", vocabulary=64)


Probe = tuple[Path, dict[str, torch.Tensor], list[str]]
"""The student's folder, its gradient by HF tensor name from the dense reference, and the run's overrides."""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    folder = tmp_path_factory.mktemp("experts")
    student = make_model("qwen3_moe", folder / "student", seed=11, vocab_size=64)
    return make_probe(folder, student, make_qwen2(folder / "teacher", seed=12, vocab_size=64))


def make_probe(folder: Path, student: Path, teacher: Path) -> Probe:
    rows = make_rollouts(student, seed=13)
    reference = kdrl(student, teacher, rows, SETTINGS)
    rollouts = write_jsonl(folder / "rollouts.jsonl", rows)
    overrides = [
        f"student.path={student}",
        f"teacher.path={teacher}",
        "rollout=replay",
        f"rollout.path={rollouts}",
        "objective=kdrl",
        f"objective.beta.init={SETTINGS.beta}",
        "optimizer.name=sgd",
        f"optimizer.lr={LEARNING_RATE}",
        "optimizer.clip_grad=0",
        "trainer.steps=1",
        "batch.micro_tokens=64",
        "checkpoint.every=-1",
        "logging.progress=false",
        "logging.tensorboard=false",
    ]
    return student, one_by_one(reference.gradients), overrides


def one_by_one(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`transformers` stacks a layer's experts in memory; checkpoints name each."""
    result = {}
    for name, gradient in gradients.items():
        prefix, _, which = name.rpartition(".experts.")
        if which == "gate_up_proj":
            for expert, both in enumerate(gradient):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    result[f"{prefix}.experts.{expert}.{part}_proj.weight"] = half
        elif which == "down_proj":
            result.update({f"{prefix}.experts.{expert}.down_proj.weight": each for expert, each in enumerate(gradient)})
        else:
            result[name] = gradient
    return result


def check(probe: Probe, pool: RankPool, layout: list[str], run_dir: Path) -> None:
    """The weights after one step of plain SGD are those before it, minus lr times the reference's gradient."""
    student, gradients, overrides = probe
    codes = pool.run(worker.train, [*overrides, *layout, f"run.dir={run_dir}"], timeout=250)
    assert codes == [0] * pool.world_size
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    assert json.loads(line)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    before, after = read_hf_weights(student), read_hf_weights(run_dir / "hf")
    assert before.keys() == after.keys() == gradients.keys()
    moved = {name: (before[name].double() - after[name].double()) / LEARNING_RATE for name in before}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # A weight's float32 rounding, seen through the difference, is the floor.
        tolerance = 1e-4 * float(gradient.abs().max()) + 3e-7 * float(before[name].abs().max()) / LEARNING_RATE
        assert float((moved[name] - gradient).abs().max()) <= tolerance, name
    router = gradients.get("model.layers.0.mlp.gate.weight")
    assert router is None or float(router.abs().max()) > 1e-3 * largest  # it does learn


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
    codes = ranks2.run(worker.train, [*probe[2], "parallel.tensor=2", f"run.dir={tmp_path}"])
    assert codes == [2, 2]


@pytest.mark.parametrize("prompts", [1, 3], ids=["a replica without prompts", "uneven replicas"])
def test_experts_spread_over_replicas_sample_the_same_tokens(
    prompts: int, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """Replicas that finish early go on serving the others with their experts."""
    student = make_model("qwen3_moe", tmp_path / "student", seed=11)
    make_tokenizer(student)
    rollouts = write_jsonl(tmp_path / "rollouts.jsonl", make_rollouts(student, seed=13, vocabulary=60))
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
        assert len({len(row["response_token_ids"]) for row in spread["plain"]}) > 1
        for one, other in zip(alone["plain"], spread["plain"], strict=True):
            assert one["sampler_log_probs"] == pytest.approx(other["trainer_log_probs"], abs=1e-4)

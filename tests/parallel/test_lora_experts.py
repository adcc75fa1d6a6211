"""Adapters of experts compute what `peft` computes with its `target_parameters`, wherever the experts are: loss, log-probs and
the gradient of every factor. They are saved, resumed in another layout, exported and merged as other adapters are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from kdrl_mcore.cli import convert
from tests.reference import adapters, dense
from tests.reference.tiny_models import make_model, make_qwen2, make_rollouts, read_hf_weights, write_jsonl
from tests.support import lora
from tests.support.agreement import SETTINGS
from tests.support.lora import Adapted, adapt
from tests.support.ranks import RankPool
from tests.support.training import FAST, metrics_of, train_on_rank

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
SP = "parallel.tensor=2 parallel.sequence_parallel=true"
SMALL = replace(SETTINGS, vocab_size=64)


@dataclass(frozen=True)
class Mixture:
    """A student with experts, a dense teacher, and rollouts."""

    student: Path
    teacher: Path
    rollouts: Path
    rows: list[dense.Row]

    def adapt(self, folder: Path, modules: Sequence[str], parameters: Sequence[str]) -> Adapted:
        """Random adapters."""
        return adapt(folder, self.student, self.teacher, self.rollouts, modules, parameters)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    student = make_model("qwen3_moe", folder / "student", seed=11, vocab_size=64)
    rows = make_rollouts(student, seed=13)
    teacher = make_qwen2(folder / "teacher", seed=12, vocab_size=64)
    return Mixture(student, teacher, write_jsonl(folder / "rollouts.jsonl", rows), rows)


@pytest.mark.parametrize(
    "modules, parameters, layout",
    [
        (ATTENTION, (), SP + " parallel.expert=2"),
        (("q_proj", "o_proj"), (GATE_UP, DOWN), "parallel.expert=2"),
        ((), (GATE_UP,), SP),
        (ATTENTION, (DOWN,), "parallel.pipeline=2 parallel.recompute=full batch.micro_tokens=40"),
    ],
    ids=["attention, tp2 sp ep2", "both weights, ep2", "experts alone, tp2 sp", "down_proj, pp2 recomputed"],
)
def test_loss_log_probs_and_gradients_are_those_of_peft(
    modules: Sequence[str],
    parameters: Sequence[str],
    layout: str,
    mixture: Mixture,
    ranks2: RankPool,
    tmp_path: Path,
) -> None:
    adapted = mixture.adapt(tmp_path / "adapter", modules, parameters)
    lora.check(adapted, mixture.rows, SMALL, ranks2, layout, tmp_path / "run")


def test_other_adapters_of_experts_teach(mixture: Mixture, ranks2: RankPool, tmp_path: Path) -> None:
    """As a second set over the student's base, without a second copy of it."""
    adapted = replace(mixture.adapt(tmp_path / "adapter", ("o_proj",), (GATE_UP,)), teacher=None)
    folder = adapters.make_adapter(
        mixture.student, tmp_path / "teacher", seed=9, rank=3, modules=("q_proj",), parameters=(GATE_UP, DOWN)
    )
    taught = replace(adapted, teacher_adapter=folder)
    assert lora.check(taught, mixture.rows, SMALL, ranks2, "parallel.expert=2", tmp_path / "run") == 1


@pytest.mark.timeout(900)  # saves start processes
def test_a_checkpoint_goes_on_in_another_layout_and_exports_are_the_run(
    mixture: Mixture, ranks2: RankPool, tmp_path: Path
) -> None:
    adapted = mixture.adapt(tmp_path / "adapter", ("q_proj",), (GATE_UP, DOWN))
    settings = [*adapted.overrides, "optimizer.lr=0.01", "optimizer.adam_eps=1e-3", f"objective.beta.init={SMALL.beta}", *FAST]

    def train(run: str, steps: int, every: int, layout: str) -> None:
        words = [f"run.dir={tmp_path / run}", f"trainer.steps={steps}", f"checkpoint.every={every}", *layout.split()]
        outcomes = ranks2.run(train_on_rank, [*settings, *words])
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr

    def export(name: str, *words: str) -> Path:
        saved = tmp_path / "parted" / "checkpoints" / "step_000001"
        assert convert.main(["export", "--checkpoint", str(saved), "--output", str(tmp_path / name), *words]) == 0
        return tmp_path / name

    train("straight", 2, -1, "parallel.expert=2")
    train("parted", 1, 0, "parallel.expert=2")
    run = tmp_path / "parted"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (export(f"peft {name}", "--adapter") / name).read_bytes() == (run / "adapter" / name).read_bytes()
    merged, wanted = read_hf_weights(export("merged")), read_hf_weights(run / "hf")
    assert merged.keys() == wanted.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight, wanted[name], rtol=2e-7, atol=1e-7)
    with torch.no_grad():
        tokens = torch.arange(1, 9)[None]
        pair = [
            dense.load_model(run / "hf")(tokens).logits,
            adapters.load_adapted(mixture.student, run / "adapter")(tokens).logits,
        ]
    torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-5)
    train("parted", 2, -1, SP)
    straight, parted = (metrics_of(tmp_path / run) for run in ("straight", "parted"))
    for name in ("loss", "grad_norm", "kl"):
        assert [row[name] for row in parted] == pytest.approx([row[name] for row in straight], rel=1e-4), name
    assert parted[0]["loss"] != parted[1]["loss"]

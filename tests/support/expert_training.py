"""One training step of a mixture of experts, compared with the dense reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdrl_mcore.rollout.experts import encode
from tests.reference.dense import Row, Settings, kdrl
from tests.reference.tiny_models import make_rollouts, read_hf_weights, write_jsonl
from tests.support import conversion_ranks
from tests.support.ranks import RankPool

LEARNING_RATE = 0.5

SETTINGS = Settings(alpha=1.0, beta=0.1, estimator="k2", vocab_size=64)

CORRECTION_BIAS = "e_score_correction_bias"

Probe = tuple[Path, dict[str, torch.Tensor], list[str]]
"""The student's folder, its gradient by HF tensor name from the dense reference, and the run's overrides."""


def make_probe(folder: Path, student: Path, teacher: Path, num_layers: int | None = None) -> Probe:
    """Args:
    num_layers: the layers with experts, if a sampler chose experts for every token, at random.
    """
    rows = make_rollouts(student, seed=13)
    if num_layers is not None:
        choose_experts(rows, num_layers)
    reference = kdrl(student, teacher, rows, SETTINGS)
    rollouts = write_jsonl(folder / "rollouts.jsonl", [{**row, "chosen": None} for row in rows])
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
    gradients = one_by_one(reference.gradients)
    for name, tensor in read_hf_weights(student).items():
        if name.endswith(CORRECTION_BIAS):  # no gradient reaches it
            gradients[name] = torch.zeros_like(tensor)
    return student, gradients, overrides


def choose_experts(rows: list[Row], num_layers: int) -> None:
    """2 of 8 experts for every token but the last, in every layer; the same for a prompt's tokens in all of its rows. `chosen`
    has them for the reference, `experts` as in a rollout file."""
    random, of_prompts = np.random.default_rng(3), dict[str, np.ndarray]()
    for row in rows:
        tokens = len(row["prompt_token_ids"]) + len(row["response_token_ids"]) - 1
        chosen = random.random((tokens, num_layers, 8)).argsort(axis=2)[:, :, :2]
        of_prompt = of_prompts.setdefault(row["prompt_id"], chosen[: len(row["prompt_token_ids"])])
        chosen[: len(of_prompt)] = of_prompt
        row |= {"chosen": chosen.tolist(), "experts": encode(chosen.astype(np.uint8))}


def one_by_one(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`transformers` stacks a layer's experts in memory; checkpoints name each expert."""
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
    """The weights after one step of plain SGD are the weights before it minus lr times the reference's gradient."""
    student, gradients, overrides = probe
    codes = pool.run(conversion_ranks.train, [*overrides, *layout, f"run.dir={run_dir}"], timeout=250)
    assert codes == [0] * pool.world_size
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
    assert json.loads(line)["grad_norm"] == pytest.approx(norm, rel=1e-4)
    before, after = read_hf_weights(student), read_hf_weights(run_dir / "hf")
    assert before.keys() == after.keys() == gradients.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(CORRECTION_BIAS))
    moved = {name: (before[name].double() - after[name].double()) / LEARNING_RATE for name in before}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # The float32 rounding of a weight limits how exactly the difference gives the gradient.
        tolerance = 1e-4 * float(gradient.abs().max()) + 3e-7 * float(before[name].abs().max()) / LEARNING_RATE
        assert float((moved[name] - gradient).abs().max()) <= tolerance, name
    router = gradients.get("model.layers.0.mlp.gate.weight")
    assert router is None or float(router.abs().max()) > 1e-3 * largest  # the router learns

"""Training runs that use an engine server which is already running."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.reference.tiny_models import make_qwen2, make_tokenizer, write_jsonl
from tests.support.late_weights import train_with_late_weights_on_rank
from tests.support.training import QUIET, Outcome, train_on_rank

SHAPE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "tied": True}
"""vLLM's CPU kernels require head dimensions of at least 32; an output head tied to the embedding is the harder case for a
refit."""


def make_pair(folder: Path) -> None:
    """A student, a teacher and prompts."""
    for name, seed, hidden in (("student", 1, 128), ("teacher", 2, 160)):
        make_qwen2(folder / name, seed=seed, hidden_size=hidden, **SHAPE)
        make_tokenizer(folder / name)
    rows = [{"prompt": f"{a}+{a % 7}=", "answer": str(a + a % 7)} for a in range(10, 42)]
    write_jsonl(folder / "prompts.jsonl", rows)


def train(token: str, overrides: list[str]) -> Outcome:
    """A run on the ranks of a pool, which have the server's token."""
    os.environ["KDRL_ENGINE_TOKEN"] = token
    return train_on_rank(overrides)


def train_with_late_weights(token: str, overrides: list[str]) -> Outcome:
    """`train` in which weights that nobody has waited for are NaN."""
    os.environ["KDRL_ENGINE_TOKEN"] = token
    return train_with_late_weights_on_rank(overrides)


def overrides(folder: Path, run: Path, address: str, *more: str) -> list[str]:
    """Distillation and GRPO with a learning rate that changes what is sampled at every step."""
    return [
        *QUIET,
        "objective=kdrl",
        "objective.beta.init=1.0",
        "rollout=vllm",
        "rollout.vllm.placement=server",
        f'rollout.vllm.servers=["{address}"]',
        "rollout.vllm.refit_bucket_mib=1",
        f"run.dir={run}",
        f"student.path={folder / 'student'}",
        f"teacher.path={folder / 'teacher'}",
        f"data.train={folder / 'prompts.jsonl'}",
        "data.template=plain",
        "rollout.prompts_per_step=4",
        "rollout.responses_per_prompt=4",
        "rollout.max_prompt_tokens=16",
        "rollout.max_response_tokens=24",
        "optimizer.lr=3e-3",
        "parallel.tensor=2",
        "trainer.steps=4",
        *more,
    ]


def evaluate(token: str, arguments: list[str]) -> Outcome:
    """`tools/evaluate.py` on the ranks of a pool, which have the server's token."""
    from tests.support.commands import evaluate_on_rank

    os.environ["KDRL_ENGINE_TOKEN"] = token
    return evaluate_on_rank(arguments)


def broken_refit(token: str, model: str, folder: str, address: str) -> str:
    """A refit during which one tensor never arrives; returns the message."""
    from kdrl_mcore.errors import RefitError
    from kdrl_mcore.rollout.refit.refit import send_weights
    from kdrl_mcore.rollout.vllm.client import EngineServer
    from tests.support.refit_ranks import FAULTS, build

    parts = build(model, {"tensor": 2}, student=True)
    servers = []
    if parts.groups.tensor.rank() == 0:
        servers = [EngineServer(0, Path(folder), address=address, token=token)]
    try:
        with FAULTS["lost"]():
            send_weights(parts, servers, 1, 60.0, 2**18, colocated=True, workers=2)
    except RefitError as error:
        return str(error)
    return ""


def refit(token: str, model: str, folder: str, address: str, version: int, unfinished: str) -> None:
    """Send a server the weights of a model as this version; `unfinished` says how unfinished responses continue."""
    from kdrl_mcore.rollout.refit.refit import send_weights
    from kdrl_mcore.rollout.vllm.client import EngineServer
    from tests.support.refit_ranks import build

    parts = build(model, {"tensor": 2}, student=True)
    servers = []
    if parts.groups.tensor.rank() == 0:
        servers = [EngineServer(0, Path(folder), address=address, token=token, unfinished=unfinished)]
    send_weights(parts, servers, version, 100.0, 2**18, colocated=True, workers=2)

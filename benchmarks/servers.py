"""The part of `python tools/bench.py step` that needs a vLLM server: whole iterations of GRPO and KDRL, plain, with the teacher
scoring while the server samples, and with responses sampled one step ahead. One rank trains and one engine samples, each with
one thread."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from rich.table import Table

from kdrl_mcore.config import load_config
from kdrl_mcore.types import Rollout

if TYPE_CHECKING:
    from kdrl_mcore.job import Job

MODES: dict[str, tuple[str, ...]] = {
    "GRPO": ("objective.beta.init=0",),
    "KDRL": (),
    "KDRL, mask": ("objective.kd.mask=response",),
    "KDRL, teacher while sampling": ("teacher.score_while_sampling=true",),
    "KDRL, mask, teacher while sampling": ("objective.kd.mask=response", "teacher.score_while_sampling=true"),
    "GRPO, one step ahead": ("objective.beta.init=0", "rollout.steps_ahead=1"),
    "KDRL, one step ahead": ("rollout.steps_ahead=1",),
}
"""The settings of each mode in addition to `SIZES`."""
SIZES = {
    "rollout.prompts_per_step": 8,
    "rollout.responses_per_prompt": 8,
    "rollout.max_prompt_tokens": 16,
    "rollout.max_response_tokens": 192,
    "rollout.max_sequences": 16,
    "batch.micro_tokens": 1024,
}
"""Most responses of a random student end before the limit, but almost every group has one that reaches it: groups are completed
one after another only because two of the eight are decoded at once. The teacher scores a group or two at a time."""
STEP = 2
"""The step of every iteration: all have the same prompts and seeds. One step ahead, the step before it starts the sampling."""
REWARD = "bench:share"
"""The kind of the reward that counts a share of all responses as correct."""
PHASES = {"refit": "wait, refit", "rollout": "rollout", "teacher": "teacher", "train": "training"}

Iterations = dict[str, list[dict[str, float]]]
"""The step metrics of every counted iteration, by mode."""


def why_not_here() -> str | None:
    """The reason why there cannot be a server in addition to this rank; None if there can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return "the server needs a GPU that no rank uses"
    return None


def measure(folder: Path, correct: float, repeats: int) -> Iterations:
    """Measure whole iterations in every mode, in turn, on the same engine with a learning rate of zero. Needs one rank.

    Args:
        folder: the folder with the models of `bench_step.write_pair`; the engine's files go there too.
        correct: the approximate share of responses that count as correct.

    Raises:
        ConfigError, EngineError: the engine did not start, or could not be restarted.
    """
    from kdrl_mcore.build import build_job
    from kdrl_mcore.reward.registry import register_function

    @register_function(REWARD)
    def counts_as_correct(rollout: Rollout) -> float:
        return float(crc32(rollout.response_token_ids.tobytes()) < correct * 2**32)

    common = [
        *(
            "experiment=tiny_cpu",
            "objective=kdrl",
            "optimizer.lr=0",
            "eval.every=-1",
            f"reward.kind={REWARD}",
            f"run.dir={folder}",
        ),
        *(f"student.path={folder}/student", f"teacher.path={folder}/teacher"),
        *(f"data.train={folder}/data/train.jsonl", f"data.eval={folder}/data/eval.jsonl"),
        *("rollout=vllm", "rollout.vllm.placement=server", "rollout.vllm.replicas=1", "rollout.vllm.kv_cache_gib=0.5"),
        *(f"{key}={size}" for key, size in SIZES.items()),
    ]
    measured: Iterations = {name: [] for name in MODES}
    with _one_thread_each():
        job = build_job(load_config(common))
        try:
            modes = {name: _in_mode(job, [*common, *changes]) for name, changes in MODES.items()}
            _iteration(modes["KDRL"])  # fills caches, creates the optimizer state, teaches the engine the lengths
            for _ in range(repeats):
                for name, mode in modes.items():
                    measured[name].append(_iteration(mode))
        finally:
            job.close()
    return measured


def _in_mode(job: Job, settings: list[str]) -> Job:
    """The same models, engine and prompts with other settings of the iteration."""
    from kdrl_mcore.build import build_sampling_source
    from kdrl_mcore.objective.schedules import Coefficient
    from kdrl_mcore.rollout.source import SampledRollouts

    config, shared = load_config(settings), job.source
    assert isinstance(shared, SampledRollouts)
    source = build_sampling_source(config, job.student, shared.engine, shared.prompts, shared.verifier)
    return replace(job, config=config, beta=Coefficient(config.objective.beta), source=source)


def _iteration(job: Job) -> dict[str, float]:
    """The metrics of iteration `STEP`. One step ahead, this is a steady state: the iteration before started its responses."""
    from kdrl_mcore.iteration import run_iteration
    from kdrl_mcore.monitoring.clock import Clock

    first = STEP - job.config.rollout.steps_ahead
    cursor = job.source.state_dict()["prompts"] | {"given": (first - 1) * job.config.rollout.prompts_per_step}
    job.source.load_state_dict({"prompts": cursor})
    metrics: dict[str, float] = {}
    for step in range(first, STEP + 1):
        _, metrics = run_iteration(job, step, Clock())
    job.source.finish()  # the engine is free for the next mode
    return metrics


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One thread for this process and one for the engine that it starts, so that each has one of the two cores."""
    threads, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if variable is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = variable


def table(pair: str, measured: Iterations) -> Table:
    """The medians in seconds by mode, the ratios to GRPO, and the saving of each measure per iteration (a cost if negative)."""

    def of(mode: str, metric: str = "time/step") -> float:
        return median(metrics[metric] for metrics in measured[mode])

    title = (
        f"{pair} pair with a vLLM server: {SIZES['rollout.prompts_per_step']} x {SIZES['rollout.responses_per_prompt']} "
        f"responses of {of('KDRL', 'response_length'):.0f} tokens (limit {SIZES['rollout.max_response_tokens']}), "
        f"{SIZES['rollout.max_sequences']} at once,\none thread for the trainer and one for the engine, "
        f"{len(measured['KDRL'])} repeats"
    )
    result = Table(title=title, title_justify="left")
    for name in ("iteration", "seconds", *PHASES.values(), "scored early"):
        result.add_column(name, justify="left" if name == "iteration" else "right")
    for mode in MODES:
        tokens = of(mode, "teacher_tokens")
        early = f"{of(mode, 'teacher_tokens_early') / tokens:.0%}" if tokens else "-"
        result.add_row(mode, f"{of(mode):.3f}", *(f"{of(mode, f'time/{phase}'):.3f}" for phase in PHASES), early)
    result.add_section()
    plain, meanwhile, ahead = "KDRL", "KDRL, teacher while sampling", "KDRL, one step ahead"
    for one in (mode for mode in MODES if mode.startswith("KDRL")):
        result.add_row(f"{one} / GRPO", f"{of(one) / of('GRPO'):.2f}")
    result.add_row("KDRL / GRPO, both one step ahead", f"{of(ahead) / of('GRPO, one step ahead'):.2f}")
    result.add_section()
    result.add_row("saved by teacher while servers sample", f"{of(plain) - of(meanwhile):.3f}")
    result.add_row("saved by one-step-off generation", f"{of(plain) - of(ahead):.3f}")
    return result

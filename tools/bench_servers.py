"""The part of `python tools/bench.py step` that needs a vLLM server: whole iterations of GRPO and KDRL, with the teacher while
servers sample, and one step ahead. One rank trains with one thread, one engine samples with one thread."""

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
"""What each mode sets beside `SIZES`."""
SIZES = {
    "rollout.prompts_per_step": 8,
    "rollout.responses_per_prompt": 8,
    "rollout.max_prompt_tokens": 16,
    "rollout.max_response_tokens": 192,
    "rollout.max_sequences": 16,
    "batch.micro_tokens": 1024,
}
"""Most of a random student's responses end before the limit, but hardly a group without one that reaches it: that groups are
complete one after the other comes from decoding two of the eight at once. A part that the teacher scores is a group or two."""
STEP = 2
"""Every iteration is this one: the same prompts and seeds. One step ahead, the one before it fills the pipe."""
REWARD = "bench:share"
"""The kind of the reward that takes a share of all responses for correct."""
PHASES = {"refit": "wait, refit", "rollout": "rollout", "teacher": "teacher", "train": "training"}

Iterations = dict[str, list[dict[str, float]]]
"""The step metrics of every counted iteration, by mode."""


def why_not_here() -> str | None:
    """Why there can be no server beside this rank; None if there can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return "the server needs a GPU that no rank uses"
    return None


def measure(folder: Path, correct: float, repeats: int) -> Iterations:
    """Whole iterations in every mode, in turn, on the same engine; the learning rate is zero. Needs a world of one rank.

    Args:
        folder: of `bench_step.write_pair`; gets the engine's files.
        correct: about which share of the responses is taken for correct.

    Raises:
        ConfigError, EngineError: the engine did not start, or cannot be brought back.
    """
    from kdrl_mcore.job import build_job
    from kdrl_mcore.reward.registry import register_function

    @register_function(REWARD)
    def is_taken_for_correct(rollout: Rollout) -> float:
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
            _iteration(modes["KDRL"])  # caches fill, the optimizer makes its state, the engine learns how long responses are
            for _ in range(repeats):
                for name, mode in modes.items():
                    measured[name].append(_iteration(mode))
        finally:
            job.close()
    return measured


def _in_mode(job: Job, settings: list[str]) -> Job:
    """The same models, engine and prompts under other settings of the iteration."""
    from kdrl_mcore.objective.schedules import Coefficient
    from kdrl_mcore.rollout.ahead import NextBatch
    from kdrl_mcore.rollout.vllm import VllmEngine

    config = load_config(settings)
    assert isinstance(job.engine, VllmEngine)
    ahead = NextBatch(job.engine) if config.rollout.steps_ahead else None
    return replace(job, config=config, beta=Coefficient(config.objective.beta), next_batch=ahead)


def _iteration(job: Job) -> dict[str, float]:
    """The metrics of iteration `STEP`. One step ahead, that of the steady state: its responses were begun in the one before."""
    from kdrl_mcore.iteration import run_iteration
    from kdrl_mcore.monitoring.clock import Clock

    assert job.prompts is not None
    first = STEP - job.config.rollout.steps_ahead
    cursor = job.prompts.state_dict() | {"given": (first - 1) * job.config.rollout.prompts_per_step}
    job.load_sampling_state({"prompts": cursor, "pending": None})
    metrics: dict[str, float] = {}
    for step in range(first, STEP + 1):
        _, metrics = run_iteration(job, step, Clock())
    if job.next_batch is not None:
        job.next_batch.finish()  # the engine is free for the next mode
    return metrics


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """One thread for this process and for the engine that it starts, so that each of two cores has one of them."""
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
    """Medians in seconds by mode, the ratios to GRPO, and what each measure saves of an iteration (negative: costs)."""

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

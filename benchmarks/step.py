"""`python tools/bench.py step`: the phases of a step, and the cost of the teacher over GRPO on the same rollouts."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import replicas as bench_replicas
from benchmarks import servers as bench_servers
from benchmarks.help import Defaults
from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning.live import LiveBytes
from kdrl_mcore.resilience.files import write_file
from kdrl_mcore.types import Rollout

if TYPE_CHECKING:
    from kdrl_mcore.job import Job

PAIRS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "tiny": (
        {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2},
        {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2},
    ),
    "larger": (
        {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_hidden_layers": 6},
        {"hidden_size": 512, "intermediate_size": 1664, "num_attention_heads": 16, "num_hidden_layers": 8},
    ),
}
"""Random student and teacher; the larger teacher has five times its student's parameters."""
BETA = 2e-3
OPTIMIZER_OFF, TEACHER_ON = "KDRL, optimizer off-load", "KDRL, teacher on the GPU"
WIDTH = 120
"""The width of a table if the output is not a terminal."""


@dataclass
class Times:
    """The measurements of one phase.

    Attributes:
        seconds, cpu_seconds: wall-clock time and CPU time, one value per repeat.
        peak_bytes: the peak bytes of live tensors made in the phase, measured in a separate repeat (without the optimizer
            state, which already exists then).
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declare the sub-command."""
    parser = commands.add_parser(
        "step",
        help="the phases of a training step, and the cost of KDRL over GRPO",
        description="Samples one batch with a random student, then updates it in turn with GRPO and KDRL, with and without the "
        "response mask, on these same rollouts; also measures the saving of each measure that makes big runs cheaper. Then "
        "measures updates of two replicas, with and without overlapped reduction and gathering. With vLLM, also measures whole "
        "iterations with a server: plain, with the teacher scoring while it samples, and one step ahead.",
        formatter_class=Defaults,
    )
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS), help="pairs of student and teacher")
    parser.add_argument("--correct", type=float, default=0.6, help="share of the responses that count as correct")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of every phase, taken in turn; the median counts")
    parser.add_argument("--no-replicas", action="store_true", default=None, help="leave out the part with two replicas")
    parser.add_argument("--no-servers", action="store_true", default=None, help="leave out the part with a vLLM server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single time to this file")


def run(options: argparse.Namespace) -> None:
    """Measure every pair in turn.

    Raises:
        ConfigError: an option is wrong.
        KdrlError: a replica or the vLLM server failed.
    """
    if options.repeats < 1 or not 0 <= options.correct <= 1:
        raise ConfigError(f"--repeats={options.repeats} must be at least 1 and --correct={options.correct} between 0 and 1")
    from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

    prepare_platform()
    created = initialize_distributed(timeout_minutes=5)
    console, report = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH), {}
    no_replicas = "--no-replicas" if options.no_replicas else bench_replicas.why_not_here()
    no_servers = "--no-servers" if options.no_servers else bench_servers.why_not_here()
    for pair in options.pairs:
        with tempfile.TemporaryDirectory(prefix="kdrl_bench_") as folder:
            write_pair(Path(folder), pair)
            measured = measure(Path(folder), options.correct, options.repeats)
            console.print(table(pair, measured))
            report[pair] = {phase: asdict(times) for phase, times in measured.items()}
            if no_replicas is None:
                updates = bench_replicas.measure(Path(folder), options.repeats)
                console.print(bench_replicas.table(pair, updates))
                report[pair]["two replicas"] = asdict(updates)
            if no_servers is None:
                iterations = bench_servers.measure(Path(folder), options.correct, options.repeats)
                console.print(bench_servers.table(pair, iterations))
                report[pair]["with a vLLM server"] = iterations
    for what, why in (
        ("overlapped gradient reduction and parameter gathering", no_replicas),
        ("the teacher while servers sample and one-step-off generation", no_servers),
        ("off-load of optimizer and teacher", None if torch.cuda.is_available() else "there is no GPU"),
    ):
        if why is not None:
            console.print(f"Not measured: {what}: {why}.")
    if created:
        torch.distributed.destroy_process_group()
    if options.json is not None:
        write_file(options.json, json.dumps(report, indent=1) + "\n")


def write_pair(folder: Path, pair: str) -> None:
    """Write random models to the folders `student` and `teacher`, and prompts to `data`."""
    from examples.tiny.task import write_data

    write_data(folder / "data", 0.0, 0)
    for name, sizes in zip(("student", "teacher"), PAIRS[pair], strict=True):
        _write_model(folder / name, sizes)


def measure(folder: Path, correct: float, repeats: int) -> dict[str, Times]:
    """Measure each phase. The learning rate is zero, so every repeat does the same work on the same weights.

    Args:
        folder: the folder of `write_pair`.
        correct: the share of responses that count as correct.
    """
    from kdrl_mcore.build import build_job
    from kdrl_mcore.iteration import compute_advantages, mask_responses, weigh_responses
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.student.update import update
    from kdrl_mcore.teacher.scores import TeacherScores

    settings = [
        *("experiment=tiny_cpu", "objective=kdrl_response_mask", f"objective.beta.init={BETA}", "optimizer.lr=0"),
        *(f"student.path={folder}/student", f"teacher.path={folder}/teacher", "eval.every=-1", "reward.workers=1"),
        *(f"data.train={folder}/data/train.jsonl", f"data.eval={folder}/data/eval.jsonl"),
    ]
    job = build_job(load_config(settings))
    objective, limit = job.config.objective, job.config.rollout.max_response_tokens
    measured: dict[str, Times] = {}
    following = False

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        if following:
            with LiveBytes() as live:
                result = work()
            measured[phase] = Times(peak_bytes=live.peak)
            return result
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times = measured.setdefault(phase, Times())
        times.seconds.append(time.perf_counter() - wall)
        times.cpu_seconds.append(time.process_time() - cpu)
        return result

    def train_on(name: str, rollouts: list[Rollout], distil_N: torch.Tensor, beta: float, job: Job = job) -> None:
        teacher = TeacherScores()
        timed(f"teacher: {name}", lambda: job.score_with_teacher(teacher, dict(enumerate(rollouts)), distil_N))
        batches = job.split(rollouts, teacher, distil_N)

        def train() -> None:
            for batch in batches:
                advantages_N = compute_advantages(objective, batch, 1.0, beta)
                update(job.student, weigh_responses(objective, batch, advantages_N, limit), job.config, 1.0, beta)

        timed(f"training: {name}", train)

    whole = replace(job, config=load_config([*settings, f"batch.micro_tokens={sys.maxsize}"]))
    off_loads = _off_loads(job, settings) if torch.cuda.is_available() else {}
    for repeat in range(repeats + 2):  # the first fills caches and creates the optimizer state, the second measures memory
        following = repeat == 1
        rollouts = timed("rollout", partial(job.source.rollouts, 1 + repeat))
        timed("reward", partial(job.source.verify, rollouts))
        for index, rollout in enumerate(rollouts):
            rollout.correct = (index * correct) % 1 + correct >= 1  # evenly spread
            rollout.reward = float(rollout.correct)
        train_on("GRPO", rollouts, mask_responses(job.config.objective, rollouts, 0.0), 0.0)
        every = torch.ones(len(rollouts), dtype=torch.bool)
        train_on("KDRL", rollouts, every, BETA)
        train_on("KDRL, mask", rollouts, mask_responses(job.config.objective, rollouts, BETA), BETA)
        train_on("KDRL, padded", [_padded(rollout, rollouts) for rollout in rollouts], every, BETA)
        with _recomputed(job.student.parts.config):
            train_on("KDRL, recompute", rollouts, every, BETA)
        train_on("KDRL, one micro-batch", rollouts, every, BETA, whole)
        for name, off_load in off_loads.items():
            train_on(name, rollouts, every, BETA, off_load)
        temperature, tokens = job.config.rollout.temperature, job.config.batch.micro_tokens
        score = partial(score_rollouts, job.student.parts, rollouts, temperature=temperature, micro_tokens=tokens)
        timed("old-policy pass", score)
    job.close()
    return measured


def _off_loads(job: Job, settings: Sequence[str]) -> dict[str, Job]:
    """The same job with its optimizer in host memory, and with its teacher, which is otherwise there, on the GPU."""
    from kdrl_mcore.student.student import Student
    from kdrl_mcore.teacher.teacher import Teacher

    vocab_size = job.student.parts.chunks[-1].shard.size
    config = load_config([*settings, "optimizer.offload=true"])
    on_gpu = replace(job.config.teacher, offload=False)
    assert on_gpu.path is not None
    return {
        OPTIMIZER_OFF: replace(job, config=config, student=Student(config, 1, vocab_size)),
        TEACHER_ON: replace(job, teacher=Teacher(on_gpu.path, on_gpu, job.config.model, 1, vocab_size)),
    }


def _padded(rollout: Rollout, rollouts: list[Rollout]) -> Rollout:
    """The response, extended to the longest sequence of the batch, as padding does."""
    missing = max(each.num_tokens for each in rollouts) - rollout.num_tokens
    tokens, log_probs = rollout.response_token_ids, rollout.sampler_log_probs
    return replace(
        rollout,
        response_token_ids=np.concatenate([tokens, np.repeat(tokens[-1:], missing)]),
        sampler_log_probs=np.concatenate([log_probs, np.repeat(log_probs[-1:], missing)]),
    )


@contextmanager
def _recomputed(config: Any) -> Iterator[None]:
    """Recompute every layer of the model with this `TransformerConfig` in the backward pass."""
    before = {name: getattr(config, f"recompute_{name}") for name in ("granularity", "method", "num_layers")}
    config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, f"recompute_{name}", value)


def _write_model(folder: Path, sizes: dict[str, int]) -> None:
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from examples.tiny.task import make_tokenizer

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=256, **sizes, **ends)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step_seconds(measured: dict[str, Times], method: str, *, cpu: bool) -> float:
    """The seconds of a whole step of a method: the sum of the medians of its phases."""
    phases = ("rollout", "reward", f"teacher: {method}", f"training: {method}")
    return sum(median(measured[phase].cpu_seconds if cpu else measured[phase].seconds) for phase in phases)


def savings(measured: dict[str, Times]) -> dict[str, tuple[float, float, int | None]]:
    """The saving of each measure in a KDRL step (a cost if negative): wall-clock and CPU seconds, and for memory measures the
    bytes at the peak of training."""

    def of(name: str, *, cpu: bool) -> float:
        return median(measured[name].cpu_seconds if cpu else measured[name].seconds)

    def scored_and_trained(method: str, *, cpu: bool) -> float:
        return of(f"teacher: {method}", cpu=cpu) + of(f"training: {method}", cpu=cpu)

    def over(one: str, other: str, *, memory: bool = False) -> tuple[float, float, int | None]:
        wall, cpu = (scored_and_trained(one, cpu=each) - scored_and_trained(other, cpu=each) for each in (False, True))
        peaks = [measured[f"training: {name}"].peak_bytes for name in (one, other)]
        return wall, cpu, peaks[0] - peaks[1] if memory else None

    saved = {
        "packing, against padding": over("KDRL, padded", "KDRL"),
        "micro-batches, against one": over("KDRL, one micro-batch", "KDRL", memory=True),
        "teacher pruned by mask": over("KDRL", "KDRL, mask"),
        "no old-policy pass": (of("old-policy pass", cpu=False), of("old-policy pass", cpu=True), None),
        "recompute": over("KDRL", "KDRL, recompute", memory=True),
    }
    if f"training: {OPTIMIZER_OFF}" in measured:
        saved["optimizer off-load"] = over("KDRL", OPTIMIZER_OFF)
        saved["teacher off-load"] = over(TEACHER_ON, "KDRL")
    return saved


def table(pair: str, measured: dict[str, Times]) -> Table:
    """The medians by phase, the ratios, and the saving of each measure."""
    result = Table(title=f"{pair} pair, {len(measured['rollout'].seconds)} repeats", title_justify="left")
    for name in ("phase", "seconds", "CPU seconds", "MiB at its peak"):
        result.add_column(name, justify="left" if name == "phase" else "right")
    for phase, times in measured.items():
        peak = f"{times.peak_bytes / 2**20:.1f}"
        result.add_row(phase, f"{median(times.seconds):.3f}", f"{median(times.cpu_seconds):.3f}", peak)
    result.add_section()
    for method in ("KDRL", "KDRL, mask"):
        ratios = [step_seconds(measured, method, cpu=cpu) / step_seconds(measured, "GRPO", cpu=cpu) for cpu in (False, True)]
        result.add_row(f"step: {method} / GRPO", *(f"{ratio:.2f}" for ratio in ratios))
    result.add_section()
    for name, (wall, cpu, saved) in savings(measured).items():
        result.add_row(f"saved by {name}", f"{wall:.3f}", f"{cpu:.3f}", "" if saved is None else f"{saved / 2**20:.1f}")
    return result

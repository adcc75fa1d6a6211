"""The part of `python tools/bench.py step` that needs two replicas of the student: gradients are reduced during the backward
pass, and weights gathered during the next update's forward pass. There are two ranks of one thread each."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.table import Table

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import KdrlError

RANKS = 2
TIMEOUT = 600
UPDATES = 2
"""The number of updates per batch: the weights of the first can be gathered during the second."""
BUCKETS = 8
"""The approximate number of parts in which the gradients are reduced."""
AFTER, GRADIENTS, BOTH = "reduced and gathered after the pass", "overlapped reduction", "overlapped reduction and gathering"
MODES: dict[str, tuple[str, ...]] = {
    AFTER: (),
    GRADIENTS: ("parallel.overlap_grad_reduce=true",),
    BOTH: ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
}


@dataclass(frozen=True)
class Updates:
    """The measurements of `UPDATES` updates in every mode.

    Attributes:
        seconds: the time until both ranks have all weights, by mode, for each repeat.
        bucket_size: the number of weights in a bucket.
        gradient_bytes, weight_bytes: the bytes that a rank reduces and gathers in an update.
    """

    seconds: dict[str, list[float]]
    bucket_size: int
    gradient_bytes: int
    weight_bytes: int


def why_not_here() -> str | None:
    """The reason why there cannot be a second rank; None if there can."""
    if torch.cuda.is_available() and torch.cuda.device_count() < RANKS:
        return f"{RANKS} ranks need {RANKS} GPUs"
    return None


def measure(folder: Path, repeats: int) -> Updates:
    """Measure the updates of two new ranks in every mode, in turn, on the same responses; the learning rate is zero.

    Args:
        folder: the folder with the models of `bench_step.write_pair`.

    Raises:
        KdrlError: a rank failed.
    """
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = torch.multiprocessing.spawn(_serve, (folder, repeats, answers), nprocs=RANKS, join=False)
    give_up = time.monotonic() + TIMEOUT
    try:
        while not ranks.join(timeout=1.0):
            if time.monotonic() > give_up:
                raise KdrlError(f"updates of {RANKS} ranks: no answer in {TIMEOUT} s")
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
        raise KdrlError(f"updates of {RANKS} ranks: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    return answers.get()


def _serve(rank: int, folder: Path, repeats: int, answers: torch.multiprocessing.SimpleQueue) -> None:
    """The main function of one rank."""
    from kdrl_mcore.parallel.platform import prepare_platform

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # selects the GPU
    prepare_platform()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, f"file://{folder / 'replicas'}", timedelta(seconds=TIMEOUT), world_size=RANKS, rank=rank)
    updates = _measure_on_rank(folder, repeats)
    if rank == 0:
        answers.put(updates)
    dist.barrier()
    dist.destroy_process_group()


def _measure_on_rank(folder: Path, repeats: int) -> Updates:
    from kdrl_mcore.build import build_job
    from kdrl_mcore.iteration import compute_advantages, mask_responses, weigh_responses
    from kdrl_mcore.student.student import Student
    from kdrl_mcore.student.update import update
    from kdrl_mcore.teacher.scores import TeacherScores

    settings = [
        *("experiment=tiny_cpu", "objective=kdrl", "optimizer.lr=0", "eval.every=-1", "reward.workers=1"),
        *(f"student.path={folder}/student", f"teacher.path={folder}/teacher", f"batch.updates_per_step={UPDATES}"),
        *(f"data.train={folder}/data/train.jsonl", f"data.eval={folder}/data/eval.jsonl", "parallel.tensor=1"),
    ]
    job = build_job(load_config(settings))
    try:
        beta, teacher = job.beta.value, TeacherScores()
        objective, limit = job.config.objective, job.config.rollout.max_response_tokens
        rollouts = job.source.rollouts(1)
        job.source.verify(rollouts)
        distil_N = mask_responses(objective, rollouts, beta)
        job.score_with_teacher(teacher, dict(enumerate(rollouts)), distil_N)
        batches = [
            weigh_responses(objective, batch, compute_advantages(objective, batch, 1.0, beta), limit)
            for batch in job.split(rollouts, teacher, distil_N)
        ]
    finally:
        job.close()

    parameters = [parameter for chunk in job.student.parts.chunks for parameter in chunk.parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    bucket_size = -(-count // BUCKETS)
    modes = {}
    for name, changes in MODES.items():
        cut = (f"parallel.bucket_size={bucket_size}",) if changes else ()
        config = load_config([*settings, *changes, *cut])
        vocab_size = job.student.parts.chunks[-1].shard.size
        modes[name] = replace(job, config=config, student=Student(config, RANKS, vocab_size))
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    for repeat in range(repeats + 2):  # Megatron-Core learns the order of the gradients in the first
        for name, mode in modes.items():
            dist.barrier()
            begin = time.perf_counter()
            for batch in batches:
                update(mode.student, batch, mode.config, 1.0, beta)
            mode.student.wait_for_weights()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            dist.barrier()
            if repeat > 1:
                seconds[name].append(time.perf_counter() - begin)
    return Updates(seconds, bucket_size, 4 * count, parameters[0].element_size() * count)


def table(pair: str, measured: Updates) -> Table:
    """The medians, and the saving of each measure (a cost if negative)."""
    seconds = {name: median(times) for name, times in measured.seconds.items()}
    result = Table(
        title=f"{pair} pair, {RANKS} replicas of one thread each: {UPDATES} updates, each reduces "
        f"{measured.gradient_bytes / 1e6:.1f} MB and gathers {measured.weight_bytes / 1e6:.1f} MB,\n"
        f"buckets of {measured.bucket_size} weights, {len(measured.seconds[AFTER])} repeats",
        title_justify="left",
    )
    for name in ("updates", "seconds"):
        result.add_column(name, justify="left" if name == "updates" else "right")
    for name, median_seconds in seconds.items():
        result.add_row(name, f"{median_seconds:.3f}")
    result.add_section()
    result.add_row("saved by overlapped gradient reduction", f"{seconds[AFTER] - seconds[GRADIENTS]:.3f}")
    result.add_row("saved by overlapped parameter gathering", f"{seconds[GRADIENTS] - seconds[BOTH]:.3f}")
    return result

"""Small runs that are interrupted, as functions for a pool of ranks."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.reference.tiny_models import make_qwen2, make_tokenizer


class Interrupted(BaseException):
    """Stands for the end of the process: the program catches it nowhere."""


def make_job(folder: Path) -> list[str]:
    """Overrides of a deterministic KDRL run whose beta changes every step; writes its models and data."""
    for name, seed in (("student", 1), ("teacher", 2)):
        make_qwen2(folder / name, seed=seed, num_layers=2)
        make_tokenizer(folder / name)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5) for b in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "objective=kdrl_annealing",
        f"student.path={folder}/student",
        f"teacher.path={folder}/teacher",
        f"data.train={folder}/train.jsonl",
        "data.template=plain",
        "reward=exact_match",
        "reward.workers=1",
        "rollout.prompts_per_step=3",
        "rollout.responses_per_prompt=2",
        "rollout.max_response_tokens=8",
        "optimizer.lr=1e-3",
        "trainer.deterministic=true",
        "trainer.self_test=false",
        "logging.tensorboard=false",
        "logging.progress=false",
    ]


def train(overrides: Sequence[str], accident: Callable[[], Any] = contextlib.nullcontext) -> tuple[int | None, str]:
    """On a rank: one run, during which `accident` happens. Returns its exit code (None if it was interrupted) and what it
    printed to standard error."""
    import torch

    from kdrl_mcore.cli.train import main

    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            with accident():
                code: int | None = main(list(overrides))
        except Interrupted:
            code = None
        finally:
            torch.use_deterministic_algorithms(False)
    return code, errors.getvalue()


@contextmanager
def _instead(owner: Any, name: str, occasion: int, action: Callable[[Any], None]) -> Iterator[None]:
    """Call `action(self)` before the `occasion`-th call of a method."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == occasion:
            action(self)
        return original(self, *args, **kwargs)

    with patch.object(owner, name, method):
        yield


def _end(self: Any) -> None:
    raise Interrupted


def in_generation(call: int) -> Any:
    """The run ends in the `call`-th generation, after the prompts are drawn and half of each response is sampled."""
    from kdrl_mcore.rollout.megatron import MegatronEngine

    decodes = 7  # in each generation of at most 8 tokens, the first of which comes from the prompt
    return _instead(MegatronEngine, "_decode", decodes * (call - 1) + decodes // 2, _end)


def in_an_update(call: int) -> Any:
    """The run ends after the gradients are reduced and before the optimizer steps."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer

    stack = contextlib.ExitStack()
    for owner in (ChainedOptimizer, MegatronOptimizer):
        if "step_with_ready_grads" in vars(owner):
            stack.enter_context(_instead(owner, "step_with_ready_grads", call, _end))
    return stack


def in_a_save(call: int) -> Any:
    """The run ends after a checkpoint's files are written and before `latest` names it."""
    from kdrl_mcore.checkpointing.writer import CheckpointWriter

    return _instead(CheckpointWriter, "_publish", call, _end)


def told_to_stop(call: int) -> Any:
    """Only rank 1 gets SIGTERM during a step."""
    import torch.distributed as dist

    from kdrl_mcore.rollout.megatron import MegatronEngine

    def tell(self: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return _instead(MegatronEngine, "sample", call, tell)


@contextmanager
def on_a_full_disk(call: int) -> Iterator[None]:
    """From the `call`-th save on, files are limited to 64 KiB: metrics still fit, shards of weights do not."""
    from kdrl_mcore.checkpointing.writer import CheckpointWriter

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = lambda self: resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, before[1]))  # noqa: E731
    try:
        with _instead(CheckpointWriter, "save", call, full):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_its_file_system(call: int) -> Any:
    """The run directory is moved away before the `call`-th save."""
    import torch.distributed as dist

    from kdrl_mcore.checkpointing.writer import CheckpointWriter

    def vanish(self: Any) -> None:
        if dist.get_rank() == 0:
            run_dir = self._directory.parent
            shutil.move(run_dir, run_dir.with_name("elsewhere"))
        dist.barrier()

    return _instead(CheckpointWriter, "save", call, vanish)


def rank_0_cannot_write(name: str, run_dir: Path, step: int) -> Any:
    """A file that only rank 0 writes cannot be opened in the checkpoint of `step`, the second one."""
    import torch.distributed as dist

    from kdrl_mcore.student.student import Student

    def stand_in_the_way(self: Any) -> None:
        if dist.get_rank() == 0:
            (run_dir / "checkpoints" / f".step_{step:06d}.partial" / "weights" / name).mkdir()

    return _instead(Student, "sharded_state", 2, stand_in_the_way)


def find(directory: str, resume: str = "auto") -> str:
    """On a rank: the checkpoint that a run would resume from, or the message of the error."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.checkpointing.checkpoint import find_checkpoint
    from kdrl_mcore.errors import CheckpointError

    try:
        return str(find_checkpoint(Path(directory), resume))
    except CheckpointError as error:
        return f"error: {error}"


def leave_writers() -> list[int]:
    """On a rank: a process starts a checkpoint writer and the process that returns the results of its writers, and is killed.
    Returns the ids of both."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from kdrl_mcore.checkpointing.writer import _write_and_checksum
    from kdrl_mcore.parallel.mcore import _write_results_process, new_write_results_queue

    answer, ask = os.pipe()
    child = os.fork()
    if child == 0:
        _write_results_process.cache_clear()
        new_write_results_queue()
        fork = multiprocessing.get_context("fork")
        writer = fork.Process(target=_write_and_checksum, args=(lambda rank: time.sleep(600), Path(), os.getpid(), 0))
        writer.start()
        os.write(ask, f"{filesystem_async._results_queue._manager._process.pid} {writer.pid}".encode())
        os.kill(os.getpid(), signal.SIGKILL)
    started = [int(pid) for pid in os.read(answer, 40).split()]
    os.waitpid(child, 0)
    os.close(answer)
    os.close(ask)
    return started


def prune(directory: str, keep: int, newest: str) -> None:
    """On a rank: delete old checkpoints, as a run does after it has written `newest`."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.checkpointing.writer import CheckpointWriter

    CheckpointWriter(Path(directory), keep, asynchronous=False)._delete_old(Path(directory) / newest)


@contextmanager
def told_to_stop_in_the_export() -> Iterator[None]:
    """Every rank gets SIGTERM while the student is exported."""
    import kdrl_mcore.trainer as trainer

    export = trainer.export_hf

    def tell_and_export(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        export(*args)

    with patch.object(trainer, "export_hf", tell_and_export):
        yield


@contextmanager
def clock_stands_still(rank: int) -> Iterator[None]:
    """On one rank, the last checkpoint is never old."""
    import torch.distributed as dist

    from kdrl_mcore.trainer import Trainer

    if dist.get_rank() != rank:
        yield
        return
    with patch.object(Trainer, "_saved_long_ago", lambda self: False):
        yield


def tokens(run_dir: Path, step: int) -> list[tuple[Any, ...]]:
    """The responses that were sampled in a step, and their rewards."""
    lines = (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(row["prompt_id"], row["response_token_ids"], row["sampler_log_probs"], row["reward"]) for row in found]

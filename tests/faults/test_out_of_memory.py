"""When GPU memory runs out, the run ends with one line: the phase, the rank, what was allocated, and the key to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import GpuMemoryError
from kdrl_mcore.monitoring import gpu_memory
from kdrl_mcore.monitoring.gpu_memory import GIB, GpuMemory, key_to_lower, out_of_memory, ran_out
from tests.support import resuming
from tests.support.ranks import RankPool
from tests.support.zoo import Zoo

MESSAGE = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 GiB is free."


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The run's overrides: one step and one checkpoint."""
    return [*resuming.make_job(tmp_path_factory.mktemp("job")), "trainer.steps=1", "checkpoint.export_hf=false"]


def run_out(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(MESSAGE)


@contextmanager
def in_the_backward_pass() -> Iterator[None]:
    """Memory runs out in a backward function, which the autograd engine calls from C++."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    forward = TransformerLayer.forward

    def with_hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        if outputs[0].requires_grad:
            outputs[0].register_hook(run_out)
        return outputs

    with patch.object(TransformerLayer, "forward", with_hook):
        yield


def in_decoding() -> Any:
    from kdrl_mcore.rollout.megatron import MegatronEngine

    return patch.object(MegatronEngine, "_decode", run_out)


def in_the_teacher() -> Any:
    from kdrl_mcore.teacher.teacher import Teacher

    return patch.object(Teacher, "scores_of", run_out)


def in_the_checkpoint() -> Any:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    return patch.object(FileSystemWriterAsync, "prepare_write_data", run_out)


@pytest.mark.parametrize(
    ("accident", "phase", "key"),
    [
        (in_the_backward_pass, "step 1, train", "lower batch.micro_tokens (now 8192), or set parallel.recompute=full"),
        (in_decoding, "step 1, rollout", "lower rollout.max_sequences (now 256)"),
        (in_the_teacher, "step 1, teacher", "lower batch.micro_tokens (now 8192) or spread the teacher over more GPUs"),
        (in_the_checkpoint, "step 1, checkpoint", "spread the student over more GPUs (parallel.tensor, parallel.pipeline)"),
    ],
)
def test_it_is_told_wherever_it_is_raised(
    accident: Callable[[], Any], phase: str, key: str, job: list[str], ranks1: RankPool, tmp_path: Path
) -> None:
    ((code, errors),) = ranks1.run(resuming.train, [*job, f"run.dir={tmp_path}"], accident)
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert code == 1 and "Traceback" not in errors
    assert line.startswith(f"error: GPU memory ran out in {phase}, on rank 0 (") and "2.50 GiB more were needed" in line
    alive, advice = line.split("allocated were: ")[1].split("; ")
    assert all(kind in alive for kind in ("gradients ", "weights ", "teacher's weights "))
    assert advice.startswith(key), line


def in_the_resumption() -> Any:
    from megatron.core import dist_checkpointing

    return patch.object(dist_checkpointing, "load", run_out)


def test_a_checkpoint_that_finds_no_room_is_not_called_damaged(job: list[str], ranks1: RankPool, tmp_path: Path) -> None:
    overrides = [*job, f"run.dir={tmp_path}"]
    assert [code for code, _ in ranks1.run(resuming.train, overrides)] == [0]
    ((code, errors),) = ranks1.run(resuming.train, [*overrides, "trainer.steps=2"], in_the_resumption)
    assert code == 1 and "cannot be loaded" not in errors
    assert "error: GPU memory ran out in step 0, resume, on rank 0 (" in errors


def test_before_there_is_a_model(job: list[str], ranks1: RankPool, tmp_path: Path) -> None:
    fault = ["fault.kind=out_of_memory", "fault.step=0", "fault.phase=load student"]
    ((code, errors),) = ranks1.run(resuming.train, [*job, f"run.dir={tmp_path}", *fault], contextlib.nullcontext)
    assert code == 1
    assert (
        "in step 0, load student, on rank 0" in errors
        and "allocated were: no parts of a model yet; spread the student" in errors
    )


def test_the_line_adds_up_to_the_gpu() -> None:
    memory = GpuMemory(allocated=60 * GIB, cached=8 * GIB, free=2 * GIB, total=80 * GIB)
    with patch.object(gpu_memory, "_gpu_memory", lambda: memory):
        error = out_of_memory(
            torch.OutOfMemoryError(MESSAGE), "step 3, train", 5, {"weights": 8 * GIB, "optimizer": 20 * GIB}, "do"
        )
    assert isinstance(error, GpuMemoryError) and error.exit_code == 1
    assert " on rank 5 (" in str(error) and ", GPU 0 of 80.0 GiB), where 2.50 GiB more were needed; allocated were: " in str(
        error
    )
    assert str(error).endswith(
        "optimizer 20.0 GiB, weights 8.0 GiB, activations and all else 32.0 GiB, cached by torch 8.0 GiB, "
        "outside torch 10.0 GiB; do"
    )


def test_the_key_is_one_that_helps() -> None:
    """A setting that is already in effect is not advised."""
    base = ["student.path=x", "teacher.path=x", "objective=kdrl"]
    colocated = load_config([*base, "rollout=vllm", "data.train=x"])
    assert key_to_lower(colocated, "rollout") == key_to_lower(colocated, "refit") == key_to_lower(colocated, "start engines")
    assert key_to_lower(colocated, "refit") == "lower rollout.vllm.gpu_memory_utilization (now what the plan leaves)"
    colocated.rollout.vllm.gpu_memory_utilization = 0.5
    assert key_to_lower(colocated, "refit") == "lower rollout.vllm.gpu_memory_utilization (now 0.5)"
    trained = load_config([*base, "data.train=x", "parallel.recompute=full", "batch.micro_tokens=4096"])
    assert key_to_lower(trained, "train").startswith("lower batch.micro_tokens (now 4096), or set optimizer.offload=true, or")
    assert "teacher.parallel.tensor" in key_to_lower(trained, "load teacher")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(MESSAGE), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error in: NCCLUtils.cpp, unhandled cuda error: Cuda failure 2 'out of memory'"), True),
        (RuntimeError("DataLoader worker is out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA out of memory"), False),
    ],
)
def test_what_counts(error: Exception, is_one: bool) -> None:
    assert ran_out(error) == is_one


def score(arguments: list[str]) -> Any:
    """On a rank: `tools/score.py`, whose first forward pass runs out of memory."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.cli.score import main
    from kdrl_mcore.model import scoring
    from tests.support.training import listen

    with patch.object(scoring, "score_rollouts", run_out):
        return listen(lambda: main(arguments))


def evaluate(arguments: list[str]) -> Any:
    """On a rank: `tools/evaluate.py`, likewise."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.cli.evaluate import main
    from tests.support.training import listen

    with in_decoding():
        return listen(lambda: main(arguments))


def test_the_tools_tell_it_too(job: list[str], zoo: Zoo, ranks1: RankPool, tmp_path: Path) -> None:
    files = ["--input", str(zoo.rollouts("uneven")), "--output", str(tmp_path / "scored.jsonl")]
    (scored,) = ranks1.run(score, ["--model", str(zoo.model("untied")), *files])
    student, train = (
        next(value for value in job if value.startswith(key)).split("=")[1] for key in ("student.path", "data.train")
    )
    (evaluated,) = ranks1.run(
        evaluate,
        ["--model", student, "--data", train, "--output", str(tmp_path / "e"), "data.template=plain", "reward=exact_match"],
    )
    for outcome, phase, key in ((scored, "scoring", "--micro-tokens"), (evaluated, "evaluation", "rollout.max_sequences")):
        assert outcome.code == 1
        assert f"error: GPU memory ran out in {phase}, on rank 0 (" in outcome.stderr and f"; lower {key} " in outcome.stderr

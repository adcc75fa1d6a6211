"""Training runs on paper CUDA, as functions for a pool of ranks."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.training import QUIET, Outcome, train_on_rank


def train_on_paper(overrides: Sequence[str], triton: bool = False) -> Outcome:
    """`train_on_rank`, with the output head in interpreted Triton or in torch; in torch, the fused SwiGLU also rounds as the
    plain one does, so that the CPU's digits are expected.

    `found` has, for each phase, this rank's host syncs by line ("syncs") and its forward passes in training ("passes"). For the
    beginning of each phase it has the phase's name, the allocated bytes of GPU memory, and the bytes of what a run keeps all
    the time ("phases": `kept_bytes`).
    """
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from megatron.core.fusions import fused_bias_swiglu

    from kdrl_mcore.student.student import Student
    from kdrl_mcore.trainer import Trainer
    from kdrl_mcore.vocab_parallel import chunk
    from tests.paper_cuda.memory import ledger
    from tests.paper_cuda.syncs import syncs

    enter, forward = Trainer._enter, Student._forward_step
    of_phase: dict[str, Any] = {}
    passes: dict[str, int] = defaultdict(int)
    phases: list[tuple[str, int, dict[str, int]]] = []
    syncs.clear()

    def enter_phase(trainer: Any, phase: str) -> None:
        of_phase[ledger.phase] = syncs.copy()
        passes[phase] = 0
        gc.collect()
        phases.append((phase, ledger.live, kept_bytes(trainer.job)))
        ledger.enter(phase)
        enter(trainer, phase)
        syncs.clear()

    def count_pass(*args: Any) -> Any:
        passes[ledger.phase] += 1
        return forward(*args)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Student, "_forward_step", count_pass))
        patches.enter_context(patch.object(Trainer, "_enter", enter_phase))
        patches.callback(torch.use_deterministic_algorithms, False)
        if not triton:
            patches.enter_context(patch.object(chunk, "_has_triton", lambda: False))
            patches.enter_context(patch.object(fused_bias_swiglu, "swiglu_back", _plain_swiglu_back))
        outcome = train_on_rank(overrides)
    outcome.found = {"syncs": of_phase, "passes": dict(passes), "phases": phases}
    return outcome


def train_in_shapes_of_a_gpu(overrides: Sequence[str]) -> Outcome:
    """`train_on_rank` on the CPU, decoding over padded keys, looking for finished responses every 16 tokens, and with
    Megatron-Core's own linear layers, as on a GPU: sums then have the same order."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model import linear
    from kdrl_mcore.rollout import megatron

    def cache(*args: Any, few_shapes: bool) -> Any:
        return KVCache(*args, few_shapes=True)

    KVCache, looks = megatron.KVCache, megatron._STEPS_BETWEEN_LOOKS
    with (
        patch.object(megatron, "KVCache", cache),
        patch.dict(looks, {"cpu": looks["cuda"]}),
        patch.object(linear.ColumnParallel, "forward", linear.ColumnParallelLinear.forward),
        patch.object(linear.RowParallel, "forward", linear.RowParallelLinear.forward),
    ):
        return train_on_rank(overrides)


def train_beside_an_engine(overrides: Sequence[str], port: int) -> Outcome:
    """`train_on_paper` with a colocated vLLM engine. The trainer's side is complete, with refit by CUDA IPC; the engine is the
    weight receiver at `port`, which answers every request with the same two tokens.

    `found` also has "awake": the allocated bytes of GPU memory, and the bytes of what is kept, whenever the engine has or
    allocates memory.
    """
    from kdrl_mcore import build
    from kdrl_mcore.rollout.vllm.placement import Replicas
    from kdrl_mcore.trainer import Trainer
    from tests.paper_cuda.memory import ledger
    from tests.support.receiver import DictServer

    trainers: list[Trainer] = []
    awake: list[tuple[str, int, dict[str, int]]] = []

    def note(moment: str) -> None:
        if trainers:
            gc.collect()
            awake.append((moment, ledger.live, kept_bytes(trainers[0].job)))

    class Engine(DictServer):
        token, log, version = "", Path("log"), -1

        def wake(self, tags: Sequence[str]) -> None:
            note(f"wake {','.join(tags)}")

        def sleep(self) -> bool:
            note("sleep")
            return True

        def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
            received = super().receive_weights(version, spec)
            self.version = version
            return received

        def health(self) -> dict[str, Any]:
            return {"usable": True, "version": self.version}

        def stop(self) -> None:
            pass

        async def generate(self, http: Any, version: int, requests: Sequence[Any], sampling: Any) -> AsyncIterator[Any]:
            note("generate")
            for request in requests:
                yield {
                    "id": request["id"],
                    "versions": [[version, 2]],
                    "finish_reason": "length",
                    "token_ids": [5, 6],
                    "log_probs": [-4.6, -4.6],
                }

    set_up = Trainer.__init__

    def remember(trainer: Trainer, *args: Any) -> None:
        set_up(trainer, *args)
        trainers.append(trainer)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Trainer, "__init__", remember))
        patches.enter_context(
            patch.object(build, "start_replicas", lambda *args, **settings: Replicas([Engine(0, port)], [0], colocated=True))
        )
        outcome = train_on_paper(overrides)
    outcome.found["awake"] = awake
    return outcome


def kept_bytes(job: Any) -> dict[str, int]:
    """Bytes of GPU memory of the student's weights, gradients and optimizer state, and of the teacher."""
    from kdrl_mcore.parallel.host_state import state_tensors
    from tests.paper_cuda.memory import Block, mark_of

    student = job.student
    buffers = [buffer for chunk in student.optimizer.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    teacher = [] if job.teacher is None else job.teacher.chunks
    head = [] if student.teacher_head is None else [student.teacher_head.weight_VG]
    tensors = {
        "weights": [*student.parts.parameters()],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": [*state_tensors(student.optimizer.megatron)],
        "teacher": [*(weight for chunk in teacher for weight in chunk.parameters()), *head],
    }
    blocks: dict[int, Block] = {}
    found = {}
    for kind, group in tensors.items():
        marks = [mark_of(tensor) for tensor in group if tensor is not None]
        new = {
            id(mark): mark for mark in marks if isinstance(mark, Block) and mark.index is not None and id(mark) not in blocks
        }
        blocks |= new
        found[kind] = sum(block.size for block in new.values())
    return found


def _plain_swiglu_back(d_out: Tensor, inputs: Tensor) -> Tensor:
    gate, linear = inputs.chunk(2, -1)
    return torch.cat((torch.ops.aten.silu_backward(d_out * linear, gate), d_out * F.silu(gate)), -1)


def paper_overrides(folder: Path, run: Path, student: str = "student") -> list[str]:
    """A run with every phase: self-test, sampling, evaluation, checkpoint, export."""
    return [
        f"run.dir={run}",
        f"student.path={folder / student}",
        f"teacher.path={folder / 'teacher'}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'train.jsonl'}",
        "data.template=plain",
        "eval.every=2",
        "reward=exact_match",
        "reward.workers=1",
        "objective=kdrl",
        "objective.beta.init=0.3",
        "rollout.prompts_per_step=2",
        "rollout.responses_per_prompt=3",
        "rollout.max_response_tokens=6",
        "batch.micro_tokens=20",
        "optimizer.lr=0.01",
        "optimizer.adam_eps=1e-3",
        "trainer.steps=2",
        *QUIET[:2],
    ]

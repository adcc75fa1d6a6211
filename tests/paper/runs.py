"""Training runs on paper CUDA, as the pools' ranks make them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.training import Outcome, train_on_rank


def train_on_paper(overrides: Sequence[str], triton: bool = False) -> Outcome:
    """`train_on_rank`, with the output head in interpreted Triton, or in torch, and then with a fused SwiGLU that rounds as the
    plain one does: so that the CPU's digits are to be expected. `found` has this rank's host syncs of each phase
    by line ("syncs"), and at the beginning of each phase its name, the bytes of GPU memory that are alive, and those of what a
    run keeps all the time ("phases": `kept_bytes`)."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from megatron.core.fusions import fused_bias_swiglu

    from kdrl_mcore.trainer import Trainer
    from kdrl_mcore.vocab_parallel import chunk
    from tests.paper_cuda.memory import ledger
    from tests.paper_cuda.syncs import syncs

    enter = Trainer._enter
    of_phase: dict[str, Any] = {}
    phases: list[tuple[str, int, dict[str, int]]] = []
    syncs.clear()

    def enter_phase(trainer: Any, phase: str) -> None:
        of_phase[ledger.phase] = syncs.copy()
        gc.collect()
        phases.append((phase, ledger.live, kept_bytes(trainer.job)))
        ledger.enter(phase)
        enter(trainer, phase)
        syncs.clear()

    with ExitStack() as patches:
        patches.enter_context(patch.object(Trainer, "_enter", enter_phase))
        if not triton:
            patches.enter_context(patch.object(chunk, "_has_triton", lambda: False))
            patches.enter_context(patch.object(fused_bias_swiglu, "swiglu_back", _plain_swiglu_back))
        outcome = train_on_rank(overrides)
    outcome.found = {"syncs": of_phase, "phases": phases}
    return outcome


def kept_bytes(job: Any) -> dict[str, int]:
    """GPU memory of the student's weights, gradients and optimizer state, and of the teacher."""
    from kdrl_mcore.parallel.host_state import state_tensors
    from tests.paper_cuda.memory import Block, mark_of

    student = job.student
    buffers = [buffer for chunk in student.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    head = [] if student.teacher_head is None else [student.teacher_head.weight_VG]
    tensors = {
        "weights": [*student.parts.parameters()],
        "gradients": [buffer.grad_data for buffer in buffers],
        "optimizer": [*state_tensors(student.optimizer)],
        "teacher": [*(job.teacher.parts.parameters() if job.teacher is not None else ()), *head],
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

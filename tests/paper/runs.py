"""Training runs on paper CUDA, as the pools' ranks make them."""

from __future__ import annotations

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
    by line ("syncs"), the most bytes of GPU memory that were alive in each phase ("peaks"), and how many of them are alive
    after it ("left")."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from megatron.core.fusions import fused_bias_swiglu

    from kdrl_mcore.trainer import Trainer
    from kdrl_mcore.vocab_parallel import chunk
    from tests.paper_cuda.memory import ledger
    from tests.paper_cuda.syncs import syncs

    enter = Trainer._enter
    of_phase: dict[str, Any] = {}
    syncs.clear()
    ledger.peaks.clear()

    def enter_phase(trainer: Any, phase: str) -> None:
        of_phase.setdefault(ledger.phase, syncs.copy())
        syncs.clear()
        ledger.enter(phase)
        enter(trainer, phase)

    with ExitStack() as patches:
        patches.enter_context(patch.object(Trainer, "_enter", enter_phase))
        if not triton:
            patches.enter_context(patch.object(chunk, "_has_triton", lambda: False))
            patches.enter_context(patch.object(fused_bias_swiglu, "swiglu_back", _plain_swiglu_back))
        outcome = train_on_rank(overrides)
    outcome.found = {"syncs": of_phase, "peaks": dict(ledger.peaks), "left": ledger.live}
    return outcome


def _plain_swiglu_back(d_out: Tensor, inputs: Tensor) -> Tensor:
    gate, linear = inputs.chunk(2, -1)
    return torch.cat((torch.ops.aten.silu_backward(d_out * linear, gate), d_out * F.silu(gate)), -1)

"""Fault injection (`fault.*`), to test recovery: one rank fails at the beginning of one phase of one step.

Off unless `fault.kind` is set. Faults are injected where phases begin or after the optimizer's step, so no other file contains
code for them.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdrl_mcore.config import FaultConfig

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}
UPDATE = "update"
"""Not a phase, but the moment in the phase `train` after the optimizer has changed the weights."""


class InjectedFault(RuntimeError):
    """Simulates an unforeseen error."""


class FaultInjector:
    """The fault to inject on one rank."""

    def __init__(self, fault: FaultConfig, rank: int) -> None:
        self._fault = fault if fault.kind != "none" and fault.rank == rank else None
        self._updated: torch.optim.Optimizer | None = None

    def strike(self, step: int, phase: str, chunks: Sequence[nn.Module] = ()) -> None:
        """Inject the fault if this is the configured rank, step and phase. Called when a phase begins.

        Args:
            chunks: the chunks of the model that runs in this phase.
        """
        fault = self._fault
        if fault is None or step < fault.step:
            return
        if fault.phase == UPDATE and phase == "train" and (step == fault.step or fault.kind == "slow"):
            self._strike_after_the_optimizer(step)
        if phase != fault.phase:
            return
        if fault.kind == "slow":
            time.sleep(fault.seconds)
            return
        if step > fault.step:
            return
        self._fault = None
        where = f"rank {fault.rank}, step {step}, phase {phase}"
        if fault.kind == "fail":
            raise InjectedFault(f"injected failure: {where}")
        if fault.kind == "out_of_memory":
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.50 GiB. Injected: {where}")
        if fault.kind == "hang":
            while True:
                time.sleep(3600)
        if fault.kind == "full_disk":  # this process and its children can write at most one page to a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        if fault.kind == "nan" and phase == UPDATE:
            _poison_a_weight(self._updated)
        elif fault.kind == "nan":
            _poison_next_output(chunks[-1])

    def _strike_after_the_optimizer(self, step: int) -> None:
        """Inject the fault once, after this rank's next optimizer step."""

        def strike(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            handle.remove()
            self._updated = optimizer
            self.strike(step, UPDATE)

        handle = register_optimizer_step_post_hook(strike)


@torch.no_grad()
def _poison_a_weight(optimizer: torch.optim.Optimizer | None) -> None:
    assert optimizer is not None
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.numel()]
    weights[-1].view(-1)[0] = float("nan")


def _poison_next_output(chunk: nn.Module) -> None:
    """Make the chunk's next hidden states, and so its logits, NaN."""

    def poison(_: nn.Module, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * float("nan")

    handle = chunk.register_forward_hook(poison)

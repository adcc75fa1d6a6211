"""A fault on purpose (`fault.*`): what tests of recovery let happen to one rank, at the beginning of one phase of one step.

Off unless `fault.kind` is set. It strikes where every phase begins, so that no other file knows of it.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdrl_mcore.config import FaultConfig

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGTERM}


class InjectedFault(RuntimeError):
    """Stands for an error that nobody foresaw."""


class FaultInjector:
    """The fault of one rank's run."""

    def __init__(self, fault: FaultConfig, rank: int) -> None:
        self._fault = fault if fault.kind != "none" and fault.rank == rank else None
        self.models: Mapping[str, Sequence[nn.Module]] = {}
        """The model chunks that work in a phase, for `nan`."""

    def strike(self, step: int, phase: str) -> None:
        """Called when a phase begins. Does nothing unless this is the place."""
        fault = self._fault
        if fault is None or phase != fault.phase or step < fault.step:
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
        if fault.kind == "full_disk":  # what this process and its children write ends at one page
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        if fault.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[fault.kind])
        if fault.kind == "nan":
            _poison_next_output(self.models[phase][-1])


def _poison_next_output(chunk: nn.Module) -> None:
    """The chunk's next hidden states, and so its logits, are NaN."""

    def poison(_: nn.Module, inputs: Any, output: Any) -> Any:
        handle.remove()
        return output * float("nan")

    handle = chunk.register_forward_hook(poison)

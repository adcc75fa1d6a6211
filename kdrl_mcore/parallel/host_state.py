"""Keep the optimizer's state in host memory while forward and backward passes run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.parallel.platform import device


def state_tensors(optimizer: Any) -> Iterator[Tensor]:
    """The state of a Megatron-Core optimizer: float32 copies of lower-precision weights, and moments."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):  # sharded over replicas, and unsharded
            for group in getattr(part, name, []):
                yield from (weight for weight in group if weight is not None)
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


class HostState:
    """Moves the state between device and host. The host's copy is pinned and kept, so only the first move allocates memory."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._host: dict[Tensor, Tensor] = {}

    def leave(self) -> None:
        """After the update: copy the state to the host and free it on the device."""
        for tensor in state_tensors(self._optimizer):
            if tensor.device.type == "cpu":
                continue
            if tensor not in self._host:
                self._host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host[tensor].copy_(tensor.data, non_blocking=True)
        torch.cuda.synchronize()
        for tensor, host in self._host.items():
            tensor.data = host

    def enter(self) -> None:
        """Before the update: copy the state back to the device."""
        for tensor in self._host:
            tensor.data = tensor.data.to(device(), non_blocking=True)

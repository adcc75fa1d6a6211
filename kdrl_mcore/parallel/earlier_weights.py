"""A float32 copy of earlier weights of a model in training, or of their average, sharded as the optimizer's state is.

The copy replaces the present weights for a while (`EarlierWeights.in_model`), so no second model is needed: 4 bytes per
parameter, divided among the replicas where the optimizer is distributed. An average in bfloat16 would lose every
update that is smaller than 1/256 of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.optimizer_state import HeldWeight, held_weights, sharded_blocks


class EarlierWeights:
    """A copy of the float32 weights that an optimizer updates."""

    def __init__(self, optimizer: Any, *, on_host: bool) -> None:
        """Copy the present weights. No communication.

        Args:
            optimizer: Megatron-Core's.
            on_host: keep the copy in (pinned) host memory.
        """
        self._optimizer = optimizer
        self._held: list[HeldWeight] = list(held_weights(optimizer))
        self._earlier = [self._copy(held.weight, on_host=on_host) for held in self._held]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the present weights again."""
        for held, earlier in zip(self._held, self._earlier, strict=True):
            earlier.copy_(held.weight.data)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """E <- decay * E + (1 - decay) * W, for the present weights W."""
        for held, earlier in zip(self._held, self._earlier, strict=True):
            moved = earlier.to(held.weight.device).lerp_(held.weight.data, 1 - decay)
            if moved is not earlier:
                earlier.copy_(moved)

    @contextmanager
    def in_model(self, gather: Callable[[], None]) -> Iterator[None]:
        """A context in which the model has the earlier weights; afterwards it has the present ones again, bit for bit.

        Args:
            gather: gathers the weights that other replicas hold; called at both ends of the context. Collective.
        """
        self._exchange(gather)
        try:
            yield
        finally:
            self._exchange(gather)

    def sharded(self, weights: Mapping[str, Any]) -> list[Any]:
        """Megatron's sharded tensors of this rank's share, to save or to load in place.

        Args:
            weights: the sharded tensors of the model.
        """
        return sharded_blocks(weights, zip(self._held, self._earlier, strict=True), "earlier")

    @torch.no_grad()
    def _exchange(self, gather: Callable[[], None]) -> None:
        for held, earlier in zip(self._held, self._earlier, strict=True):
            present = held.weight.data.clone()  # of one weight at a time
            held.weight.data.copy_(earlier)
            earlier.copy_(present)
        mcore.copy_to_model(self._optimizer)
        gather()

    @staticmethod
    def _copy(weight: Tensor, *, on_host: bool) -> Tensor:
        copied = weight.detach().float().clone()
        return copied.cpu().pin_memory() if on_host and copied.is_cuda else copied

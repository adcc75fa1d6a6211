"""Random states and recomputation, as far as Megatron-Core uses them without FP8."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint


class CudaRNGStatesTracker:
    """Named random states; nothing here is random, so none is ever added."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        self.states_ = {}

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        raise NotImplementedError("the stand-in for Transformer Engine draws no random numbers")


def get_all_rng_states() -> dict[str, torch.Tensor]:
    return {}


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    return nullcontext()


def is_fp8_activation_recompute_enabled() -> bool:
    return False


def checkpoint(
    function: Any,
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **kwargs: Any,
) -> Any:
    """Run the function again in the backward pass."""
    if distribute_saved_activations:
        raise NotImplementedError
    return torch_checkpoint(function, *args, use_reentrant=True, **kwargs)

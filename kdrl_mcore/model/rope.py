"""The rotary frequencies for each kind of context extension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_mcore.model.families.rope import Rope


@dataclass(frozen=True)
class RotaryFrequencies:
    """One rotary embedding of a model.

    Attributes:
        inverse: the angle per position of each pair of rotated dimensions, float32.
        scale: multiplies cosine and sine (yarn).
    """

    inverse: Tensor
    scale: float


def rotary_frequencies(rope: Rope, head_dim: int, device: torch.device) -> RotaryFrequencies:
    """The frequencies of a rotary embedding for heads of `head_dim` dimensions, of which it may rotate a share."""
    return RotaryFrequencies(inverse_frequencies(rope, int(head_dim * rope.share), device), rope.attention_factor)


def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """The angle per position of each pair of dimensions [D/2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    assert rope.kind == "default"
    return plain


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between interpolated."""
    turns = rope.original_positions * plain / (2 * math.pi)  # of each dimension over the original context
    kept = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(rope: Rope, plain: Tensor, head_dim: int) -> Tensor:
    """Dimensions that turn often over the original context are kept, those that turn seldom are stretched, with a linear ramp
    between them."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension_of(rope.high), dimension_of(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float32, device=plain.device)
    stretched = ((steps - first) / ((last - first) or 0.001)).clamp(0, 1)
    return stretched * plain / rope.factor + (1 - stretched) * plain

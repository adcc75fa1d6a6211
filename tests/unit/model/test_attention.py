"""The rotary embedding: its values, and a gradient that is rotated back."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_mcore.model.attention import apply_rotary


def rotate_simply(x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_SHD.chunk(2, dim=-1)
    return torch.cat((first * cos_SD - second * sin_SD, second * cos_SD + first * sin_SD), dim=-1)


def test_values_and_gradient_are_those_of_autograd_to_the_bit() -> None:
    """Also for a view whose heads are not adjacent in memory, like queries stored with keys and values."""
    mixed = torch.randn(7, 5, 16)
    angles = torch.randn(7, 1, 4)
    weight = torch.randn(7, 3, 8)
    found = []
    for function in (rotate_simply, apply_rotary):
        x = mixed.clone().requires_grad_()
        rotated = function(x[:, :3, 4:12], angles.cos(), angles.sin())
        (rotated * weight).sum().backward()
        assert x.grad is not None
        found.append((rotated.detach(), x.grad))
    for simple, fused in zip(*found, strict=True):
        assert torch.equal(simple, fused)

"""The norms. As operations they take their width first and learn of sequence parallelism only from an attribute of their
parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer_engine.pytorch.module.base import check_device


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, zero_centered_gamma: bool) -> Tensor:
    """RMSNorm or LayerNorm over the last dimension in float32, rounded once."""
    gamma = weight.float() + 1 if zero_centered_gamma else weight.float()
    if kind == "RMSNorm":
        return F.rms_norm(x.float(), weight.shape, gamma, eps).to(x.dtype)
    assert bias is not None
    return F.layer_norm(x.float(), weight.shape, gamma, bias.float(), eps).to(x.dtype)


class _Norm(nn.Module):
    kind: str

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ) -> None:
        super().__init__()
        width = hidden_size if normalized_shape is None else normalized_shape
        assert isinstance(width, int) and (params_dtype is None or dtype is None)
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        self.bias: nn.Parameter | None = None
        fill = 0.0 if zero_centered_gamma else 1.0
        settings: dict[str, Any] = {"dtype": dtype or params_dtype, "device": "cuda" if device is None else device}
        self.weight = nn.Parameter(torch.full((width,), fill, **settings))
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(width, **settings))
        if sequence_parallel is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        check_device(x)
        return normalize(x, self.weight, self.bias, self.eps, self.kind, self.zero_centered_gamma)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel():
            raise NotImplementedError


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"

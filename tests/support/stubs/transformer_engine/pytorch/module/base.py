"""What Transformer Engine's modules have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

GEMM_PARALLEL_MODES = ("row", "column", None)


def check_device(*tensors: Tensor) -> None:
    """Transformer Engine accepts CUDA tensors only: whatever `device="cuda"` means in this process."""
    device = torch.empty(0, device="cuda").device.type
    assert all(tensor.device.type == device for tensor in tensors), "TransformerEngine needs CUDA."


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """An empty gradient for autograd, so that its hooks run although the real gradient is already in `main_grad`."""
    return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype, device="cuda")


def set_tensor_model_parallel_attributes(tensor: Tensor, dim: int) -> None:
    """Mark a weight as split along `dim` over tensor-parallel ranks."""
    for name, value in (("tensor_model_parallel", True), ("partition_dim", dim), ("partition_stride", 1)):
        setattr(tensor, name, value)


class TransformerEngineBaseModule(nn.Module):
    """A module on a CUDA device, with an `_extra_state` that is empty without FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.tp_group: dist.ProcessGroup | None = None
        self.tp_size = 1
        self.tp_group_initialized = False
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def set_tensor_parallel_group(self, tp_group: dist.ProcessGroup | None) -> None:
        self.tp_group = tp_group
        self.tp_group_initialized = True

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and not isinstance(state, Tensor):
            raise RuntimeError("Unsupported checkpoint format.")
        if state is not None and state.numel():
            raise NotImplementedError

    def init_fp8_metadata(self, num_gemms: int = 1) -> None: ...

    def _take_tensor_parallel(self, tp_group: dist.ProcessGroup | None, tp_size: int) -> None:
        if tp_group is not None:
            tp_size = tp_group.size()
        self.tp_size = tp_size
        if tp_group is not None or tp_size == 1:
            self.set_tensor_parallel_group(tp_group)

    def _check_input(self, inp: Tensor) -> None:
        check_device(inp)
        assert self.tp_size == 1 or self.tp_group_initialized, "TP group not initialized."
        for name, parameter in self.named_parameters():
            assert inp.dtype == parameter.dtype, (
                f"Data types for parameters must match when outside of autocasted region. Found input dtype: {inp.dtype} and "
                f"{name!r} dtype: {parameter.dtype}"
            )


def refuse(**unset: Any) -> None:
    """Raise NotImplementedError if an argument that is not imitated is set."""
    for name, value in unset.items():
        if value:
            raise NotImplementedError(f"the stand-in for Transformer Engine does not support {name}={value}")


def initialize(parameter: nn.Parameter, init_method: Callable[[Tensor], Any] | None) -> None:
    with torch.no_grad():
        (init_method or nn.init.normal_)(parameter)


def weight_gradient(weight: nn.Parameter, wgrad: Tensor, fuse: bool, is_first_microbatch: bool | None) -> Tensor | None:
    """What autograd gets for a weight: its gradient or, if that is added to `main_grad`, an empty one (None without the
    attribute by which a data-parallel wrapper says that it checks)."""
    if not fuse:
        return wgrad.to(weight.dtype)
    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    if is_first_microbatch or getattr(weight, "overwrite_main_grad", False):
        main_grad.copy_(wgrad)
    else:
        main_grad.add_(wgrad)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return get_dummy_wgrad(list(main_grad.shape), weight.dtype, zero=getattr(weight, "zero_out_wgrad", False))

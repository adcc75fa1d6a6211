"""FusedAdam and the multi-tensor functions, with Transformer Engine's arguments and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from transformer_engine.pytorch.module.base import check_device


def multi_tensor_applier(op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, in float32."""
    if per_tensor:
        raise NotImplementedError
    norms = [tensor.float().norm() for tensor in tensor_lists[0]]
    return torch.stack(norms).norm().reshape(1), torch.empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float | Tensor) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step count is in the parameter group, next to `bias_correction`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        if amsgrad or not adam_w_mode or capturable or master_weights or use_decoupled_grad or set_grad_none is not None:
            raise NotImplementedError
        if {master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype} != {torch.float32} or store_param_remainders:
            raise NotImplementedError
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            if not group["params"]:
                continue
            bias_correction = 1 if group["bias_correction"] else 0
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            scale1, scale2 = ((1 - beta ** group["step"]) if bias_correction else 1.0 for beta in (beta1, beta2))
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update({name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")})
                if parameter.grad is None:
                    continue
                check_device(parameter, parameter.grad)
                gradient = parameter.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                update = state["exp_avg"] / scale1 / ((state["exp_avg_sq"] / scale2).sqrt() + group["eps"])
                parameter.sub_(group["lr"] * (update + group["weight_decay"] * parameter))


class FusedSGD(torch.optim.SGD):
    """torch's function with the arguments that Megatron-Core passes."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

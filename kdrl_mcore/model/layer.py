"""What some families add to Megatron-Core's transformer layer: norms after a block, scaled residual branches, and norms of
queries and keys over all heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdrl_mcore.model.norm import RMSNorm

Branch = tuple[Tensor, Tensor | None]
"""The output of attention or MLP, and the bias that is still to be added to it."""
AddBranch = Callable[[Branch, Tensor, float], Tensor]


def scaled_add(scale: float) -> Callable[[bool, bool], AddBranch]:
    """residual + scale * branch, in the form of Megatron-Core's `get_bias_dropout_add` (without dropout)."""

    def choose(training: bool, fused: bool) -> AddBranch:
        def add(branch: Branch, residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            return torch.add(residual, output if bias is None else output + bias, alpha=scale)

        return add

    return choose


class NormsAfterLayer(TransformerLayer):
    """Megatron-Core's layer with a norm of what each block adds to the residual stream: x + norm(block(x))."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in ("self_attn", "mlp"):
            norm = RMSNorm(self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon)
            setattr(self, f"post_{name}_layernorm", norm)
            setattr(self, f"{name}_bda", _normed(getattr(self, f"{name}_bda"), norm))


def _normed(choose: Callable[[bool, bool], AddBranch], norm: RMSNorm) -> Callable[[bool, bool], AddBranch]:
    def choose_normed(training: bool, fused: bool) -> AddBranch:
        add = choose(training, fused)

        def add_normed(branch: Branch, residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            return add((norm(output if bias is None else output + bias), None), residual, dropout)

        return add_normed

    return choose_normed


class AllHeadsNorm(nn.Module):
    """RMSNorm of queries or keys over all heads of a token, which the tensor-parallel ranks share.

    Each rank has the weights of its own heads. One scalar per token is all-reduced (SUM) over the tensor-parallel group, in
    the forward and in the backward pass.
    """

    def __init__(self, config: TransformerConfig, heads: int, tp_group: dist.ProcessGroup) -> None:
        """Args:
        heads: the number of heads of all ranks together.
        tp_group: the ranks that share them.
        """
        super().__init__()
        self.eps, self.width, self.tp_group = config.layernorm_epsilon, heads * config.kv_channels, tp_group
        self.weight = nn.Parameter(torch.ones(self.width // tp_group.size(), dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x_SND: Tensor) -> Tensor:
        """[S, heads of this rank, D] -> the same shape and dtype; the statistics are float32."""
        x = x_SND.float()
        squares: Tensor = _SumOverRanks.apply(x.square().sum(dim=(1, 2), keepdim=True), self.tp_group)
        normed = (x * torch.rsqrt(squares / self.width + self.eps)).to(x_SND.dtype)
        return normed * self.weight.view(1, *x_SND.shape[1:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The weight as Megatron-Core's checkpoints hold it, split along its only axis."""
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a group. Every rank uses the sum, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None

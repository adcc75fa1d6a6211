"""The factors of a model's adapters (model/lora.py) by name, and as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from kdrl_mcore.model.lora import ADAPTER, adapters
from kdrl_mcore.parallel.layout import ModelGroups


@dataclass(frozen=True)
class Factor:
    """One factor of a projection.

    Attributes:
        name: `HF_NAME.lora_A.weight`, or `lora_B`; for an expert's, with the expert's number (`Factors.name`).
        parameter: this rank's share of it.
        split: the dimension along which tensor-parallel ranks split it; None if it is whole.
        expert: see `Factors`.
        whole: the shape of the whole factor; the shares of the output head's B may have more rows, for vocabulary padding.
    """

    name: str
    parameter: nn.Parameter
    split: int | None
    expert: tuple[int, int] | None
    whole: tuple[int, int]

    def replica(self, groups: ModelGroups) -> tuple[int, int, int]:
        """This rank's place among those that hold the same share; one of them has zeros."""
        if self.expert is not None:
            return 0, 0, groups.groups.expt_dp.rank()
        return 0, groups.tensor.rank() if self.split is None else 0, groups.replicas.rank()


def factors_by_name(chunk: nn.Module, name: str = ADAPTER) -> Iterator[Factor]:
    """Every factor of a model chunk."""
    for adapter in adapters([chunk], name):
        for factors in adapter.factors:
            row, column = (None, None) if factors.expert is not None else (1, None) if factors.is_row else (None, 0)
            rank = factors.a.size(0)
            yield Factor(f"{factors.name}.lora_A.weight", factors.a, row, factors.expert, (rank, factors.inputs))
            yield Factor(f"{factors.name}.lora_B.weight", factors.b, column, factors.expert, (factors.outputs, rank))


def sharded_factors(chunk: nn.Module, groups: ModelGroups) -> dict[str, ShardedTensor]:
    """The factors of a model chunk as Megatron's sharded tensors: a tensor for each factor of a projection, divided as
    tensor-parallel ranks split it; those of all experts of a layer are stacked. They share memory with the parameters."""
    state: dict[str, ShardedTensor] = {}
    for factor in factors_by_name(chunk):
        key, cut = factor.name, []
        if factor.split is not None:
            cut = [(factor.split, groups.tensor.rank(), groups.tensor.size())]
        elif factor.expert is not None:
            key, cut = factor.name.replace(f".experts.{factor.expert[0]}.", ".experts."), [(0, *factor.expert)]
        state[factor.name] = ShardedTensor.from_rank_offsets(
            key,
            factor.parameter,
            *cut,
            replica_id=factor.replica(groups),
            prepend_axis_num=int(factor.expert is not None),
            allow_shape_mismatch=key.startswith("lm_head."),  # padding depends on the layout
        )
    return state


@torch.no_grad()
def load_factors(chunk: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy what `dist_checkpointing.load` returned for `sharded_factors` into the adapters."""
    for factor in factors_by_name(chunk):
        factor.parameter.copy_(values[factor.name])

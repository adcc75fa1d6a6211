"""Small results that every rank needs: gathered from the replicas' leaders, so that no rank ever sees the whole world's
copies."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.parallel.platform import device

T = TypeVar("T")


def gather_from_replicas(groups: ModelGroups, items: list[T]) -> list[T]:
    """The lists of all replicas of the model (data x context parallel), concatenated in rank order, on every rank.

    Only each replica's leader's `items` count. Collectives: an all-gather over the leaders of the replicas, then a broadcast
    within each replica (tensor x pipeline ranks).
    """
    shared: list[Any] = [None]
    if groups.is_replica_leader:
        gathered: list[Any] = [None] * groups.replicas.size()
        dist.all_gather_object(gathered, items, group=groups.replicas)
        shared = [[item for part in gathered for item in part]]
    if groups.groups.mp.size() > 1:
        dist.broadcast_object_list(shared, src=leader_rank(groups), group=groups.groups.mp)
    return shared[0]


def leader_rank(groups: ModelGroups) -> int:
    """The global rank of this replica's leader: tensor rank 0 of its last pipeline stage."""
    index = (groups.pipeline.size() - 1) * groups.tensor.size()
    return dist.get_global_rank(groups.groups.mp, index)


def sum_over_replicas(
    groups: ModelGroups, sums: dict[str, float], maxima: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sum and maximum over the replicas (data x context parallel) of what the last stages measured, on every rank.

    Collectives: two all-reduces over the replicas' group (last stage only), then a broadcast over the pipeline group.
    """
    values: list[Any] = [None]
    if groups.is_last_stage:
        total = torch.tensor(list(sums.values()), dtype=torch.float64, device=device())
        largest = torch.tensor(list(maxima.values()), dtype=torch.float64, device=device())
        dist.all_reduce(total, group=groups.replicas)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.replicas)
        values = [(dict(zip(sums, total.tolist(), strict=True)), dict(zip(maxima, largest.tolist(), strict=True)))]
    if groups.pipeline.size() > 1:
        last = dist.get_global_rank(groups.pipeline, groups.pipeline.size() - 1)
        dist.broadcast_object_list(values, src=last, group=groups.pipeline)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. Collective: one all-reduce over the world."""
    tensor = torch.tensor(float(flag), device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def from_first_rank(value: T) -> T:
    """What rank 0 has, on every rank. Collective: one broadcast over the world."""
    shared: list[Any] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]

"""Share small results with every rank. What all ranks of a replica hold is gathered from the replicas' leaders only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from kdrl_mcore.errors import KdrlError, StorageError
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.resilience.waiting import waits_for_others

T = TypeVar("T")


@waits_for_others
def gather_from_replicas(groups: ModelGroups, items: list[T]) -> list[T]:
    """The lists of all replicas of the model (data x context parallel), concatenated in rank order, on every rank.

    Only the `items` of replica leaders are used. Collectives: an all-gather over the leaders of the replicas, then a broadcast
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


@waits_for_others
def sum_over_replicas(
    groups: ModelGroups, sums: dict[str, float], maxima: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Sums and maxima over the replicas (data x context parallel) of the values measured by the last stages, on every rank.

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
    return each_on_any_rank([flag])[0]


@waits_for_others
def each_on_any_rank(flags: Sequence[bool]) -> list[bool]:
    """For each flag, whether it is set on any rank. Collective: one all-reduce over the world."""
    tensor = torch.tensor([float(flag) for flag in flags], device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


@waits_for_others
def gather_objects(item: T) -> list[T]:
    """The items of all ranks, in rank order, on every rank. Collective: one all-gather over the world."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item)
    return gathered


@waits_for_others
def from_first_rank(value: T) -> T:
    """Rank 0's value, on every rank. Collective: one broadcast over the world."""
    shared: list[Any] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


@waits_for_others
def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on rank 0 and return its result on every rank. Collective: one broadcast over the world.

    Raises:
        KdrlError: on every rank, if rank 0 raises it or cannot read or write a file.
    """
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            shared = [action()]
        except KdrlError as error:
            error.__traceback__ = error.__cause__ = error.__context__ = None
            shared = [error]
        except OSError as error:
            shared = [
                StorageError(f"{error.filename}: {error.strerror or error}: set its permissions, or repair the file system")
            ]
    dist.broadcast_object_list(shared, src=0)
    if isinstance(shared[0], KdrlError):
        raise shared[0]
    return shared[0]

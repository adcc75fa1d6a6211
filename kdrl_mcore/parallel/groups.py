"""Process groups, each made once: what needs a group of the same ranks gets the same group.

Megatron-Core makes groups for every kind of parallelism anew, and each model has its kinds; most are equal, or of one rank. A
group costs every rank of the world a call, and its members sockets, threads or a communicator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
"""The groups of the present world by their ranks; None where this rank is not a member. Every rank has the same keys."""
_world: dist.ProcessGroup | None = None


def group_of(ranks: Sequence[int], timeout: Any = None) -> dist.ProcessGroup | None:
    """The group of these ranks, or None on a rank that is not one of them. Collective over the world: all call in one order.

    Args:
        timeout: of its collectives, as a `timedelta`, where it is made now; the backend's own by default.
    """
    global _world
    if _world is not dist.group.WORLD:
        forget_groups()
        _world = dist.group.WORLD
    key = tuple(sorted(ranks))
    if len(key) == dist.get_world_size():
        return dist.group.WORLD
    if key not in _made:
        mine, alone = dist.get_rank() in key, len(key) == 1
        # A rank makes its group of one by itself, under a name that the others' count of groups does not depend on.
        made = dist.new_group(key, timeout=timeout, use_local_synchronization=alone) if mine or not alone else None
        _made[key] = made if mine else None
    return _made[key]


def own_group(ranks_of_groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Make all of these groups (collective over the world) and return the one this rank is in, if any."""
    groups = [group_of(ranks) for ranks in ranks_of_groups]
    return next((group for group in groups if group is not None), None)


def forget_groups() -> None:
    """The groups are destroyed: make new ones when asked again. To be called on every rank."""
    _made.clear()


@contextmanager
def shared_with_megatron() -> Iterator[None]:
    """While entered, Megatron-Core makes its groups here."""
    from megatron.core import parallel_state

    def create_group(ranks: Sequence[int], timeout: Any = None, backend: Any = None, pg_options: Any = None, **_: Any) -> Any:
        assert backend is None and pg_options is None, "groups with settings of their own cannot be shared"
        return group_of(ranks, timeout)

    original = parallel_state.create_group
    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original

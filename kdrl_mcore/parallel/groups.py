"""Process groups, each made once: every use of the same ranks shares one group.

Megatron-Core makes new groups for every kind of parallelism and every model, though most are equal or have one rank. A group
costs every rank of the world a call, and its members sockets, threads or a communicator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
"""The groups of the current world by their ranks; None where this rank is not a member. All ranks have the same keys."""
_world: dist.ProcessGroup | None = None


def group_of(ranks: Sequence[int], timeout: Any = None) -> dist.ProcessGroup | None:
    """The group of these ranks, or None on a rank that is not one of them. Collective over the world: every rank must make the
    same calls in the same order.

    Args:
        timeout: a `timedelta` for the group's collectives, if this call makes the group; None is the backend's default.
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
        # A rank makes the group that contains only itself without the others. Its name does not depend on how many groups the
        # others have made.
        made = dist.new_group(key, timeout=timeout, use_local_synchronization=alone) if mine or not alone else None
        _made[key] = made if mine else None
    return _made[key]


def own_group(ranks_of_groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Make all of these groups and return the one that this rank is in, if any. Collective over the world."""
    groups = [group_of(ranks) for ranks in ranks_of_groups]
    return next((group for group in groups if group is not None), None)


def forget_groups() -> None:
    """Forget groups that have been destroyed, so that later calls make new ones. Call it on every rank."""
    _made.clear()


@contextmanager
def shared_with_megatron() -> Iterator[None]:
    """Inside this context Megatron-Core takes its groups from here."""
    from megatron.core import parallel_state

    def create_group(ranks: Sequence[int], timeout: Any = None, backend: Any = None, pg_options: Any = None, **_: Any) -> Any:
        assert backend is None and pg_options is None, "groups with their own settings cannot be shared"
        return group_of(ranks, timeout)

    original = parallel_state.create_group
    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original

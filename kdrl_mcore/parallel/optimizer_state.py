"""The distributed optimizer's state in a checkpoint: every rank saves, and loads, the share that it holds.

Megatron-Core's own re-shardable form gathers the state of a model-parallel rank whole in the host memory of each of its
replicas, to save it and to load it: 12 bytes a parameter. Here nothing is gathered. A rank holds flat ranges of parameters;
each is cut into blocks of the parameter's global tensor, which are saved from where they lie and loaded to where they lie. The
tensors' names and global shapes are those of Megatron-Core's form, and torch's checkpoints are read by overlap: either form is
loaded as the other, in any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size along each dimension."""


def blocks_of_range(shape: tuple[int, ...], start: int, end: int) -> list[Block]:
    """Cut the elements [start, end) of a tensor, counted in memory order, into blocks that lie one after the other in memory.

    A matrix gives at most three: the rest of a row, whole rows, the beginning of a row.
    """
    if start >= end:
        return []
    if len(shape) < 2:
        return [((start,), (end - start,))] if shape else [((), ())]
    row = prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one row
        inner = blocks_of_range(shape[1:], start - last * row, end - last * row)
        return [((last, *offset), (1, *size)) for offset, size in inner]
    head = blocks_of_range(shape[1:], start - (first - 1) * row, row) if start < first * row else []
    tail = blocks_of_range(shape[1:], 0, end - last * row)
    zeros = (0,) * (len(shape) - 1)
    whole: list[Block] = [((first, *zeros), (last - first, *shape[1:]))] if last > first else []
    return [
        *(((first - 1, *offset), (1, *size)) for offset, size in head),
        *whole,
        *(((last, *offset), (1, *size)) for offset, size in tail),
    ]


@contextmanager
def held_shares(optimizer: Any) -> Iterator[None]:
    """While entered, Megatron-Core's optimizer describes, and takes over, its re-shardable state as this rank's share of it."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if isinstance(part, DistributedOptimizer)]
    for part in parts:
        part.sharded_param_state_fully_reshardable = partial(_share, part)
        part.load_parameter_state_from_fully_reshardable = _is_loaded
    try:
        yield
    finally:
        for part in parts:
            del part.sharded_param_state_fully_reshardable, part.load_parameter_state_from_fully_reshardable


def _is_loaded(share: Any) -> None:
    """What was loaded is in its place: the blocks are views of the state."""


def _share(
    part: Any, model: Mapping[str, Any], is_loading: bool = False, metadata: Mapping[str, Any] | None = None
) -> dict[int, Any]:
    """The blocks of this rank's flat ranges, as Megatron-Core's sharded tensors: views of the state, for saving and loading
    alike."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    described = {sharded.data: sharded for sharded in nested_values(extract_sharded_tensors_and_factories(model)[0])}
    share: dict[int, Any] = {}
    ranges = [ranges for buffer in part.gbuf_ranges for buckets in buffer.values() for ranges in buckets]
    for parameter, places in (item for each in ranges for item in each["param_map"].items()):
        assert parameter in described, KEEP_VARS_HINT
        held = places["param"]
        state = part._get_main_param_and_optimizer_states(parameter)
        share[len(share)] = {
            name: list(_blocks(described[parameter], f"optimizer.state.{name}", values, held.start, held.end))
            for name, values in state.items()
            if torch.is_tensor(values) and values.dim()
        }
    return share


def _blocks(sharded: Any, prefix: str, values: Tensor, start: int, end: int) -> Iterator[Any]:
    """The elements [start, end) of a parameter, whose state is `values` [end - start], as sharded tensors."""
    from megatron.core.dist_checkpointing import ShardedTensor

    values = values.detach()
    for piece, place in _pieces(sharded, f"{prefix}.{sharded.key}"):
        first, last = max(start, place), min(end, place + prod(piece.local_shape))
        done = first - start
        outer = (1,) * piece.prepend_axis_num
        for offset, size in blocks_of_range(tuple(piece.local_shape), first - place, last - place):
            data = values[done : done + prod(size)].view(*outer, *size)
            done += prod(size)
            yield ShardedTensor(
                piece.key,
                data,
                data.dtype,
                local_shape=tuple(data.shape),
                global_shape=piece.global_shape,
                global_offset=tuple(map(sum, zip(piece.global_offset, (*(0 for _ in outer), *offset), strict=True))),
                axis_fragmentations=None,  # blocks differ in size
                replica_id=(*sharded.replica_id[:2], 0),  # the last counts data-parallel replicas, which hold different blocks
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )


def _pieces(sharded: Any, key: str) -> list[tuple[Any, int]]:
    """The sharded tensors that a parameter is saved as, and where each begins in the parameter's memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(sharded, ShardedTensorFactory):
        return [(replace(sharded, key=key), 0)]
    shape = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    pieces = list(nested_values({"built": replace(sharded, key=key, data=shape).build()}))
    assert all(piece.data.is_contiguous() for piece in pieces), f"{key} is not saved in slices of its first dimension"
    return [(piece, piece.data.storage_offset()) for piece in pieces]

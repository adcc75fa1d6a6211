"""The distributed optimizer's state in a checkpoint: every rank saves and loads the share that it holds.

Megatron-Core's own re-shardable form gathers the whole state of a model-parallel rank in the host memory of each of its
replicas, both to save and to load it: 12 bytes per parameter. Here nothing is gathered. A rank holds flat ranges of parameters;
each is cut into blocks of the parameter's global tensor, which are saved and loaded in place. The tensors' names and global
shapes are those of Megatron-Core's form, and torch reads checkpoints by overlap, so each form can be loaded as the other, in
any layout.

An optimizer that is not distributed uses a few different names, and so does a chain of two (for dense weights and for experts):
`as_saved` finds the name that a checkpoint uses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPTIMIZER, OPTIMIZER_TENSORS = "optimizer", "optimizer_tensors"
"""Keys of a student's sharded state: the whole optimizer, for saving, and its tensors only, for loading."""

_NAME = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?P<state>[^.]+)\.(?P<weight>.+)")

EARLIER = "earlier"
"""The key, in what is saved, of the weights that a student may keep in addition to its present ones."""

Block = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size along each dimension."""


def blocks_of_range(shape: tuple[int, ...], start: int, end: int) -> list[Block]:
    """Cut the elements [start, end) of a tensor, counted in memory order, into blocks that follow one another in memory.

    A matrix gives at most three: the rest of a row, whole rows, and the beginning of a row.
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


class HeldWeight(NamedTuple):
    """A weight that this rank's optimizer updates.

    Attributes:
        parameter: the model's.
        weight: its elements [start, end) in float32, which the optimizer updates.
        is_share: other replicas hold other elements.
    """

    parameter: Tensor
    weight: Tensor
    start: int
    end: int
    is_share: bool


def held_weights(optimizer: Any) -> Iterator[HeldWeight]:
    """Every weight that this rank's optimizer updates, in the same order at each call."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):
            continue
        if isinstance(part, DistributedOptimizer):
            for parameter, place in _ranges(part):
                yield HeldWeight(parameter, _main(part, parameter), place.start, place.end, True)
            continue
        of_copy = {
            copy: parameter
            for parameters, copies in zip(
                getattr(part, "float16_groups", ()), getattr(part, "fp32_from_float16_groups", ()), strict=True
            )
            for parameter, copy in zip(parameters, copies, strict=True)
        }
        for group in part.param_groups:
            for weight in group["params"]:
                yield HeldWeight(of_copy.get(weight, weight), weight, 0, weight.numel(), False)


def sharded_blocks(model: Mapping[str, Any], values: Iterable[tuple[HeldWeight, Tensor]], state: str) -> list[Any]:
    """Further values of a rank's weights as sharded tensors of the optimizer's state, which are views of them.

    Args:
        model: the sharded tensors of the model.
        values: each weight with one number per element of it.
        state: the name of these values.
    """
    described = _described(model)
    return [
        block
        for held, each in values
        for block in _blocks(described[held.parameter], f"optimizer.state.{state}", each, *held[2:])
    ]


@contextmanager
def held_shares(optimizer: Any) -> Iterator[None]:
    """Inside this context Megatron-Core's optimizer saves and loads its re-shardable state as this rank's share of it."""
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


def sharded_tensors(state: Any) -> list[Any]:
    """The sharded tensors (and their factories) in a state of any structure."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    return list(nested_values(extract_sharded_tensors_and_factories(state)[0]))


def as_saved(tensors: list[Any], saved: Collection[str], *, float32_weights: bool) -> list[Any]:
    """The optimizer's sharded tensors under the names that they have in a checkpoint.

    Args:
        saved: the names in the checkpoint.
        float32_weights: the weights are float32, so they are their own master copies. A checkpoint of an optimizer that is not
            distributed then has no separate copies, and these are left out.

    Raises:
        KeyError: the checkpoint has no such tensor.
    """
    found = {_state_and_weight(name): name for name in saved if _NAME.fullmatch(name)}
    renamed = []
    for tensor in tensors:
        state, weight = _state_and_weight(tensor.key)
        name = tensor.key if tensor.key in saved else found.get((state, weight))
        if name is not None:
            renamed.append(replace(tensor, key=name))
        elif not (float32_weights and state == "param"):
            raise KeyError(f"it has no {tensor.key}")
    return renamed


def _state_and_weight(name: str) -> tuple[str, str]:
    """The state and the weight that a name stands for, in either naming."""
    matched = _NAME.fullmatch(name)
    assert matched is not None, name
    state = matched["state"]
    return "param" if state == "fp32_param" else state, matched["weight"]


def saved_step(common: Any) -> int | None:
    """The number of steps that a checkpoint's optimizer has taken: the largest count in any of its parameter groups (groups
    without parameters may have none). None for an optimizer that does not count steps (sgd)."""
    if isinstance(common, Mapping):
        own = common.get("step")
        found = [int(own)] if own is not None and not isinstance(own, Mapping | list) else []
        children: list[Any] = list(common.values())
    else:
        found, children = [], list(common) if isinstance(common, list | tuple) else []
    found += [step for child in children if (step := saved_step(child)) is not None]
    return max(found, default=None)


def _is_loaded(share: Any) -> None:
    """Nothing to do after loading, because the blocks are views of the state."""


def _share(
    part: Any, model: Mapping[str, Any], is_loading: bool = False, metadata: Mapping[str, Any] | None = None
) -> dict[int, Any]:
    """The blocks of this rank's flat ranges as Megatron-Core's sharded tensors, which are views of the state, both for saving
    and for loading."""
    from megatron.core.dist_checkpointing.optimizer import KEEP_VARS_HINT

    described = _described(model)
    share: dict[int, Any] = {}
    for parameter, held in _ranges(part):
        assert parameter in described, KEEP_VARS_HINT
        state = part._get_main_param_and_optimizer_states(parameter)
        share[len(share)] = {
            name: list(_blocks(described[parameter], f"optimizer.state.{name}", values, held.start, held.end))
            for name, values in state.items()
            if torch.is_tensor(values) and values.dim()
        }
    return share


def _described(model: Mapping[str, Any]) -> dict[Tensor, Any]:
    """The sharded tensor of each parameter."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    return {sharded.data: sharded for sharded in nested_values(extract_sharded_tensors_and_factories(model)[0])}


def _ranges(part: Any) -> Iterator[tuple[Tensor, Any]]:
    """Each parameter of a distributed optimizer that has elements on this rank, and their range."""
    for buffer in part.gbuf_ranges:
        for ranges in (ranges for buckets in buffer.values() for ranges in buckets):
            for parameter, places in ranges["param_map"].items():
                yield parameter, places["param"]


def _main(part: Any, parameter: Tensor) -> Tensor:
    """This rank's float32 elements of a parameter, which a distributed optimizer updates."""
    group, place = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][place]


def _blocks(sharded: Any, prefix: str, values: Tensor, start: int, end: int, is_share: bool = True) -> Iterator[Any]:
    """The elements [start, end) of a parameter, whose state is `values` [end - start], as sharded tensors.

    Args:
        is_share: the data-parallel ranks have different elements.
    """
    from megatron.core.dist_checkpointing import ShardedTensor

    values = values.detach().view(-1)
    for piece, begin in _saved_as(sharded, f"{prefix}.{sharded.key}"):
        first, last = max(start, begin), min(end, begin + prod(piece.local_shape))
        done = first - start
        outer = (1,) * piece.prepend_axis_num
        for offset, size in blocks_of_range(tuple(piece.local_shape), first - begin, last - begin):
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
                replica_id=(*sharded.replica_id[:2], 0 if is_share else sharded.replica_id[2]),  # the data-parallel rank
                allow_shape_mismatch=piece.allow_shape_mismatch,
            )


def _saved_as(sharded: Any, key: str) -> list[tuple[Any, int]]:
    """The sharded tensors that a parameter is saved as, and where each begins in the parameter's memory."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(sharded, ShardedTensorFactory):
        return [(replace(sharded, key=key), 0)]
    shape = torch.empty(sharded.data.shape, dtype=sharded.data.dtype, device="meta")
    pieces = list(nested_values({"built": replace(sharded, key=key, data=shape).build()}))
    assert all(piece.data.is_contiguous() for piece in pieces), f"{key} is not saved in slices of its first dimension"
    return [(piece, piece.data.storage_offset()) for piece in pieces]

"""What paper CUDA knows about torch's operations: which ones write, which ones only make views, which ones wait for the GPU,
and which ones have no deterministic CUDA kernel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_SYNCS = {
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "is_nonzero": "item",
    "_unique2": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "multinomial": "multinomial",
}
_INDEX = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_NOT_DETERMINISTIC = {
    "histc",
    "kthvalue",
    "put_",
    "put",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "_ctc_loss",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "grid_sampler_2d_backward",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
}
"""The operations listed in `torch.use_deterministic_algorithms` that are nondeterministic whatever their arguments are."""
_CUBLAS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "addmv", "mv", "dot", "linear"}
_WHOLE_TENSORS = {"cat", "stack", "gather", "index_select", "embedding", "scatter", "scatter_", "index_copy_", "index_add_"}
"""Operations that do not accept a 0-dimensional host tensor with GPU tensors; elementwise ones do."""


@dataclass(frozen=True)
class Operation:
    """An overload of a torch operation.

    Attributes:
        name: its name without namespace and overload.
        writes: positions or names of the arguments that it writes.
        is_view: whether it returns a view of an argument and runs no kernel.
        composite: whether torch composes it of others, which are dispatched instead (seen in inference mode only).
        sync: why the host waits for it, or None.
    """

    name: str
    writes: frozenset[int | str]
    is_view: bool
    composite: bool
    sync: str | None

    @property
    def indexes(self) -> bool:
        """Whether it has indices, which may be in host memory."""
        return self.name in _INDEX

    @property
    def takes_host_scalars(self) -> bool:
        """Whether 0-dimensional host tensors may be mixed with GPU tensors."""
        return self.name not in _WHOLE_TENSORS


@cache
def describe(function: Any) -> Operation:
    """The description of this overload."""
    name = function.__name__.split(".")[0]
    written = [(i, a) for i, a in enumerate(function._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    writes: set[int | str] = {i for i, a in written if not a.kwarg_only} | {a.name for _, a in written}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = has_kernel(function.name(), "CompositeImplicitAutograd") and not has_kernel(function.name(), "CPU")
    is_view = function.is_view or name in ("lift_fresh", "detach", "_unsafe_view", "_reshape_alias")
    return Operation(name, frozenset(writes), is_view, composite, _SYNCS.get(name))


def sync_of(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the host waits for this call, or None."""
    if operation.sync is not None:
        return operation.sync
    if operation.indexes:
        if "put" in operation.name and _fills_mask(args, kwargs):
            return None
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                return "boolean mask"
            if index is not None and not index.is_cuda:
                return "host index"
    if operation.name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave"
    return None


def _fills_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A host number is written where a mask is true: torch runs masked_fill, which need not know how many elements these
    are."""
    _, indices, value, *rest = args
    masks = [index for index in indices if index is not None]
    accumulates = rest[0] if rest else kwargs.get("accumulate", False)
    is_mask = len(masks) == 1 and masks[0].dtype in (torch.bool, torch.uint8) and masks[0].is_cuda
    return is_mask and not accumulates and value.numel() == 1 and not value.is_cuda


def check_deterministic(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError, as torch does, if deterministic algorithms are required and CUDA has none for this call."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    name = operation.name
    if name in _CUBLAS and os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        raise RuntimeError(f"{name}: deterministic behavior needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8")
    bad = name in _NOT_DETERMINISTIC
    if name in ("cumsum", "cumsum_"):
        dtype = kwargs.get("dtype") or args[0].dtype
        bad = dtype.is_floating_point or dtype.is_complex
    elif name == "median":
        bad = len(args) > 1 or "dim" in kwargs
    elif name == "bincount":
        bad = len(args) > 1 and args[1] is not None
    elif name in ("scatter_reduce", "scatter_reduce_"):
        bad = args[4] == "prod"
    if bad and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(
            f"{name}_cuda does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'"
        )

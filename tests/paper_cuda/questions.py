"""Where tensors are, and where Python requests them to be, answered from the marks of their memory.

`device="cuda"` becomes the CPU for torch and a `Placement` for the operations within the call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.paper_cuda import streams
from tests.paper_cuda.dispatch import Placement, placing, unwatched
from tests.paper_cuda.memory import Block, index_of, is_pinned, mark_of, storage_block

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "eye", "empty_strided", "linspace", "logspace"),
    *("randperm", "tril_indices", "triu_indices", "scalar_tensor", "empty_permuted", "normal"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
)
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
_FROM_DATA = ("tensor", "as_tensor", "asarray")
_CPU = torch.device("cpu")
_to = Tensor.to
_type = Tensor.type
_device = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]


def gpu_index(device: Any) -> int | None:
    """The GPU that a device argument names; None for another device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return device
    device = torch.device(device)
    return None if device.type != "cuda" else streams.current_index() if device.index is None else device.index


def _is_other(device: Any) -> bool:
    return not isinstance(device, int) and torch.device(device).type not in ("cpu", "cuda")


def _creating(function: Callable[..., Any], takes_tensor: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        device, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if device is None and takes_tensor and args and not pinned:
            return function(*args, **kwargs)
        if (device is not None and _is_other(device)) or torch._C._len_torch_function_stack() > 0:
            return function(*args, **kwargs)
        index = None if device is None else gpu_index(device)
        if device is not None:
            kwargs["device"] = _CPU
        with placing(Placement(index, pinned)):
            return function(*args, **kwargs)

    return create


def _from_data(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def create(data: Any, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.pop("device", None)
        pinned, gradient = kwargs.pop("pin_memory", False), kwargs.pop("requires_grad", False)
        if device is not None and _is_other(device):
            return function(data, *args, device=device, **kwargs)
        out = function(data, *args, **kwargs)
        if device is not None:
            out = out.to(device)
        out = out.pin_memory() if pinned else out
        return out.requires_grad_() if gradient else out

    return create


class _Transfer(torch.autograd.Function):
    """A copy to another device, whose gradient is copied back to the tensor's device."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, placement: Placement, options: dict[str, Any]) -> Tensor:
        context.source, context.dtype = tensor.device, tensor.dtype
        with placing(placement):
            return _to(tensor, copy=True, **options)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return gradients[0].to(context.source, context.dtype), None, None


def _move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy = kwargs.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        other, *rest = args
        args, kwargs = (other.device, other.dtype, *rest), kwargs
    elif isinstance(other := kwargs.pop("other", None), Tensor):
        args = (other.device, other.dtype)
    if args and isinstance(args[0], int) and not isinstance(args[0], bool):
        args = (torch.device("cuda", args[0]), *args[1:])
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if "meta" in (tensor.layout is torch.strided and _device(tensor).type, device is not None and device.type):
        return _to(tensor, *args, copy=copy, **kwargs)
    index = index_of(tensor) if device is None else gpu_index(device)
    options: dict[str, Any] = {"dtype": dtype or tensor.dtype}
    if memory_format is not None:
        options["memory_format"] = memory_format
    if index == index_of(tensor):
        return _to(tensor, copy=copy, **options)
    return _Transfer.apply(tensor, Placement(index, non_blocking=non_blocking), options)  # type: ignore[no-any-return, no-untyped-call]


def _pin(tensor: Tensor, device: Any = None) -> Tensor:
    if index_of(tensor) is not None:
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    if is_pinned(tensor):
        return tensor
    with placing(Placement(None, pinned=True)):
        return _to(tensor, copy=True, dtype=tensor.dtype)


def _report_type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    out = _type(tensor, *args, **kwargs)
    return out.replace("torch.", "torch.cuda.", 1) if isinstance(out, str) and index_of(tensor) is not None else out


def _report_device(tensor: Tensor) -> torch.device:
    index = index_of(tensor)
    return _device(tensor) if index is None else torch.device("cuda", index)


def _host_only(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    @functools.wraps(function)
    def convert(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        index, mark = index_of(tensor), mark_of(tensor)
        if index is not None:
            raise TypeError(
                f"can't convert cuda:{index} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
                "first."
            )
        if isinstance(mark, Block):
            read = functools.partial(_read, tensor, name)
            # Megatron-Core's token dispatcher makes the view first and waits before it reads.
            if sys._getframe(1).f_code.co_filename.endswith("/moe_utils.py"):
                return _LateArray.of(function(tensor, *args, **kwargs), read)
            read()
        return function(tensor, *args, **kwargs)

    return convert


def _read(tensor: Tensor, operation: str) -> None:
    """The host reads pinned memory."""
    mark = mark_of(tensor)
    if isinstance(mark, Block):
        mark.use(tensor, streams.host, streams.host.tick(), writes=False, operation=operation)


class _LateArray(np.ndarray):
    """A numpy view of pinned memory, checked when its numbers are read and not when it is made."""

    _check: Callable[[], None] | None = None

    @classmethod
    def of(cls, array: Any, check: Callable[[], None]) -> _LateArray:
        """Such a view of the array."""
        late = array.view(cls)
        late._check = check
        return late  # type: ignore[no-any-return]

    def __array_finalize__(self, source: Any) -> None:
        self._check = getattr(source, "_check", None)

    def _plain(self) -> Any:
        if self._check is not None:
            self._check()
        return self.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        return self._plain()[index]

    def tolist(self) -> Any:
        return self._plain().tolist()

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*(x._plain() if isinstance(x, _LateArray) else x for x in inputs), **kwargs)


def _to_list(tensor: Tensor) -> Any:
    if index_of(tensor) is not None:
        return _tolist(tensor.cpu() if tensor.dim() else tensor)
    _read(tensor, "tolist")
    return _tolist(tensor)


_tolist = Tensor.tolist


def _record_stream(tensor: Tensor, stream: Any) -> None:
    mark = mark_of(tensor)
    if isinstance(mark, Block):
        mark.record_stream(stream)


def install() -> None:
    """Replace torch's functions with these."""
    from torch.nn.attention.bias import CausalBias
    from torch.utils._device import _device_constructors

    _device_constructors()  # `with torch.device(...)` recognises the original functions from a list that is made once
    for name in _FACTORIES:
        setattr(torch, name, _creating(getattr(torch, name), name.endswith("_like") or name == "normal"))
    for name in _METHODS:
        setattr(Tensor, name, _creating(getattr(Tensor, name), takes_tensor=True))
    for name in _FROM_DATA:
        setattr(torch, name, _from_data(getattr(torch, name)))
    new_tensor = Tensor.new_tensor

    def from_data(tensor: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        out = new_tensor(tensor, data, dtype=dtype).to(tensor.device if device is None else device)
        return out.requires_grad_(requires_grad)

    resize = torch.UntypedStorage.resize_

    def resize_storage(storage: Any, size: int) -> Any:
        out, block = resize(storage, size), storage_block(storage)
        if block is not None:
            block.resize(size)
        return out

    answers: dict[str, Any] = {
        "to": _move,
        "cuda": lambda tensor, device=None, non_blocking=False, memory_format=None: _move(
            tensor, streams.current_index() if device is None else device, non_blocking=non_blocking
        ),
        "cpu": lambda tensor, memory_format=None: _move(tensor, _CPU),
        "pin_memory": _pin,
        "is_pinned": lambda tensor, device=None: is_pinned(tensor),
        "new_tensor": from_data,
        "device": property(_report_device),
        "is_cuda": property(lambda tensor: index_of(tensor) is not None),
        "is_cpu": property(lambda tensor: _report_device(tensor).type == "cpu"),
        "get_device": lambda tensor: -1 if index_of(tensor) is None else index_of(tensor),
        "type": _report_type,
        "numpy": _host_only("numpy"),
        "__array__": _host_only("__array__"),
        "tolist": _to_list,
        "record_stream": _record_stream,
    }
    for name, answer in answers.items():
        setattr(Tensor, name, answer)

    def new_bias(cls: Any, *_: Any) -> Any:
        with unwatched():  # what a dispatch mode returns is already a Python object and cannot become one of another class
            return Tensor.__new__(cls)

    CausalBias.__new__ = new_bias  # type: ignore[method-assign, assignment]
    torch.UntypedStorage.resize_ = resize_storage  # type: ignore[method-assign, assignment]

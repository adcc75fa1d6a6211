"""Activation off-load: parts of a layer hold their activations for the backward pass in pinned host memory.

While one layer computes, the activations of the previous layer are copied to the host; in the backward pass those of the next
layer are copied back. Each direction has a separate stream, and kernels wait for a copy only if PCIe is slower than the layers.

Megatron-Core has such a mechanism (`fine_grained_activation_offloading`), and `parallel.offload_activations` uses its names. It
replays the order of the first update's micro-batches and keeps a pinned buffer for every shape. Here micro-batches and their
lengths differ in every update, and the same model also scores and samples between updates.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.platform import device

IN_FLIGHT = 1
"""The number of layers whose activations are being copied to the host while another layer computes."""


def offloaded_modules(layer: Any, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules of Megatron-Core's transformer layer that the names in `parallel.offload_activations` refer to. The norm
    before a part belongs to it, because Transformer Engine's layers contain that norm."""
    attention = layer.self_attention
    of_name = {
        "qkv_linear": (layer.input_layernorm, attention.linear_qkv, attention.q_layernorm, attention.k_layernorm),
        "core_attn": (attention.core_attention,),
        "attn_proj": (attention.linear_proj,),
        "mlp": (layer.pre_mlp_layernorm, layer.mlp),
        "moe": (layer.pre_mlp_layernorm, layer.mlp),
    }
    found = dict.fromkeys(module for name in names for module in of_name[name] if module is not None)
    yield from found


class Streams:
    """The two streams in which activations are copied."""

    def __init__(self) -> None:
        self.to_host, self.to_device = torch.cuda.Stream(), torch.cuda.Stream()


class Kept:
    """Memory that autograd has saved for one or several tensors: on the device, on the host, or on both.

    Attributes:
        source: the saved memory, until the copy to the host is known to be complete.
        host: its copy in pinned memory.
        device: the copy back on the device, from the fetch to the last use.
        uses: how many saved tensors have not been used yet.
    """

    def __init__(self, source: Tensor, host: Tensor) -> None:
        self.source: Tensor | None = source
        self.host: Tensor | None = host
        self.device: Tensor | None = None
        self.uses = 0


class LayerActivations:
    """The off-loaded activations of one layer for one micro-batch."""

    def __init__(self, streams: Streams, earlier: LayerActivations | None, waiting: Waiting) -> None:
        """Args:
        earlier: the activations of the previous layer, whose backward pass comes next; None for the first layer.
        waiting: the chunk's micro-batches.
        """
        self._streams, self._earlier, self._waiting = streams, earlier, waiting
        self._kept: dict[tuple[Any, ...], Kept] = {}
        self._copied, self._arrived = torch.cuda.Event(), torch.cuda.Event()
        self._on_device = True
        self.in_backward = False

    def keep(self, tensor: Tensor) -> Saved:
        """Begin to copy a saved tensor to the host. Memory that is saved twice, in whatever shape, is copied once."""
        source, strides = tensor.detach(), None
        if source.numel() * source.element_size() == source.untyped_storage().nbytes():
            strides = source.stride()
            source = source.as_strided((source.numel(),), (1,), 0)
        key = (source.data_ptr(), source.dtype, source.shape, source.stride(), tensor._version)
        if key not in self._kept:
            host = torch.empty_like(source, device="cpu", pin_memory=True)
            self._streams.to_host.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._streams.to_host):
                host.copy_(source, non_blocking=True)
            self._copied.record(self._streams.to_host)
            self._kept[key] = Kept(source, host)
        kept = self._kept[key]
        kept.uses += 1
        return Saved(self, kept, tensor.shape, strides)

    def leave_device(self) -> None:
        """Free the memory on the device for later computation. The device waits for the copies; the host does not."""
        if self.in_backward:
            return
        torch.cuda.current_stream().wait_event(self._copied)
        for kept in self._kept.values():
            kept.source = None
        self._on_device = False

    def fetch(self) -> None:
        """Begin to copy everything back, unless it is still on the device or already being copied."""
        if self._on_device:
            return
        self._on_device = True
        for kept in self._kept.values():
            assert kept.host is not None
            kept.device = torch.empty_strided(kept.host.shape, kept.host.stride(), dtype=kept.host.dtype, device=device())
        self._streams.to_device.wait_stream(torch.cuda.current_stream())  # which may have used that memory before
        with torch.cuda.stream(self._streams.to_device):
            for kept in self._kept.values():
                assert kept.device is not None and kept.host is not None
                kept.device.copy_(kept.host, non_blocking=True)
        self._arrived.record(self._streams.to_device)

    def use(self, kept: Kept) -> Tensor:
        """Return saved memory to the backward pass of this layer. The first use also fetches what the next layer needs."""
        if not self.in_backward:
            self.fetch()
            self.in_backward = True
            for event in (self._copied, self._arrived):  # memory that was not freed may be, once its copy is complete
                torch.cuda.current_stream().wait_event(event)
            following = self._earlier or self._waiting.next()
            if following is not None:
                following.fetch()
        tensor = kept.device if kept.source is None else kept.source
        assert tensor is not None, "a backward pass goes through a layer twice"
        kept.uses -= 1
        if not kept.uses:
            kept.source = kept.device = kept.host = None
        return tensor


@dataclass(frozen=True)
class Saved:
    """What autograd holds in place of a tensor.

    Attributes:
        strides: the strides of a tensor that fills its memory, which is copied in memory order; None for a part of a storage.
    """

    layer: LayerActivations
    kept: Kept
    shape: torch.Size
    strides: tuple[int, ...] | None

    def tensor(self) -> Tensor:
        """The tensor; autograd asks for it once."""
        memory = self.layer.use(self.kept)
        return memory if self.strides is None else memory.as_strided(self.shape, self.strides)


class Waiting:
    """The micro-batches of a model chunk whose backward passes have not begun, in the order of their forward passes. Each is
    represented by its last layer, where its backward pass begins."""

    def __init__(self) -> None:
        self._last_layers: deque[weakref.ref[LayerActivations]] = deque()

    def add(self, last: LayerActivations) -> None:
        """Add a micro-batch whose forward pass has ended."""
        self._last_layers.append(weakref.ref(last))

    def next(self) -> LayerActivations | None:
        """The last layer of the first micro-batch."""
        while self._last_layers:
            last = self._last_layers[0]()
            if last is not None and not last.in_backward:
                return last
            self._last_layers.popleft()
        return None


class ActivationOffload:
    """Off-loads the activations of one model's layers on CUDA, in forward passes that autograd records."""

    def __init__(self, min_elements: int) -> None:
        """Args:
        min_elements: smaller tensors stay on the device.
        """
        self._min_elements = min_elements
        self._streams = Streams()
        self._leaving: deque[LayerActivations] = deque()
        self._current: LayerActivations | None = None
        self._weights: set[int] = set()
        self._hooks = ExitStack()

    def attach(self, layers: Sequence[Any], names: Sequence[str]) -> None:
        """Off-load the activations of the named parts of these layers.

        Args:
            layers: the layers of one model chunk, in order.
        """
        waiting = Waiting()
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._enter_layer, waiting, index == 0))
            for module in offloaded_modules(layer, names):
                module.register_forward_pre_hook(self._enter_part)
                module.register_forward_hook(self._leave_part, always_call=True)
            if index == len(layers) - 1:
                layer.register_forward_hook(partial(self._leave_chunk, waiting))

    def _enter_layer(self, waiting: Waiting, first: bool, layer: nn.Module, *_: Any) -> None:
        if not torch.is_grad_enabled():
            self._current = None
            return
        while len(self._leaving) > IN_FLIGHT:
            self._leaving.popleft().leave_device()
        self._current = LayerActivations(self._streams, None if first else self._current, waiting)
        self._leaving.append(self._current)
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def _leave_chunk(self, waiting: Waiting, *_: Any) -> None:
        if self._current is not None:
            waiting.add(self._current)
            self._current = None

    def _enter_part(self, *_: Any) -> None:
        if self._current is not None:
            self._hooks.enter_context(saved_tensors_hooks(self._save, _restore))
            self._hooks.enter_context(mcore.keeping_weights())

    def _leave_part(self, *_: Any) -> None:
        self._hooks.close()

    def _save(self, tensor: Tensor) -> Tensor | Saved:
        assert self._current is not None
        storage = tensor.untyped_storage()
        if (
            tensor.device.type != "cuda"
            or tensor.numel() < self._min_elements
            or tensor.numel() * tensor.element_size() > storage.nbytes()  # expanded
            or storage.data_ptr() in self._weights
        ):
            return tensor.detach()
        return self._current.keep(tensor)


def _restore(saved: Tensor | Saved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.tensor()

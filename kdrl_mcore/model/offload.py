"""Activation off-load: what parts of a layer keep for the backward pass waits for it in pinned host memory.

While one layer computes, what the layer before it has kept is on its way to the host; in the backward pass what the next layer
needs is on its way back. Both copies have a stream of their own, and no kernel waits for one unless PCIe is the slower.

Megatron-Core has such a mechanism (`fine_grained_activation_offloading`), whose names are used here. It replays the order of
the first update's micro-batches and keeps a pinned buffer for every shape that it meets; here every update has other
micro-batches, of other lengths, and the same model also scores and samples between updates.
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
"""Layers whose activations are on their way to the host while another one computes."""


def offloaded_modules(layer: Any, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules of Megatron-Core's transformer layer that the names of `parallel.offload_activations` stand for. The norm
    before a part belongs to it, as it lies inside the part where Transformer Engine's layers are used."""
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
    """The streams of the two copies. Of the device, whose own stream is the current one of whoever computes."""

    def __init__(self) -> None:
        self.to_host, self.to_device = torch.cuda.Stream(), torch.cuda.Stream()


class Kept:
    """Memory that autograd has saved, perhaps for several tensors: on the device, on the host, or both.

    Attributes:
        source: what was saved, until it is known to have arrived on the host.
        host: its copy in pinned memory.
        device: the copy back, from the fetch to the last use.
        uses: how many saved tensors have not been used yet.
    """

    def __init__(self, source: Tensor, host: Tensor) -> None:
        self.source: Tensor | None = source
        self.host: Tensor | None = host
        self.device: Tensor | None = None
        self.uses = 0


class LayerActivations:
    """What one layer has off-loaded of one micro-batch."""

    def __init__(self, streams: Streams, earlier: LayerActivations | None, waiting: Waiting) -> None:
        """Nothing yet.

        Args:
            earlier: the same of the layer before it, whose backward pass is the next; None for the first layer.
            waiting: the chunk's micro-batches.
        """
        self._streams, self._earlier, self._waiting = streams, earlier, waiting
        self._kept: dict[tuple[Any, ...], Kept] = {}
        self._copied, self._arrived = torch.cuda.Event(), torch.cuda.Event()
        self._on_device = True
        self.in_backward = False

    def keep(self, tensor: Tensor) -> Saved:
        """Begin to copy a saved tensor to the host. Memory that is saved again, in whatever shape, is not copied again."""
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
        """Free the memory for what is computed from here on. For that the device waits for the copies; the host does not."""
        if self.in_backward:
            return
        torch.cuda.current_stream().wait_event(self._copied)
        for kept in self._kept.values():
            kept.source = None
        self._on_device = False

    def fetch(self) -> None:
        """Begin to copy everything back, unless it still is on the device or on its way."""
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
        """What was kept, for the backward pass of this layer. The first use fetches what the next layer needs, too."""
        if not self.in_backward:
            self.fetch()
            self.in_backward = True
            for event in (self._copied, self._arrived):  # what never left may be freed once it is copied
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
        strides: those of a tensor that fills its memory, which is kept as it lies; None for a part of other memory.
    """

    layer: LayerActivations
    kept: Kept
    shape: torch.Size
    strides: tuple[int, ...] | None

    def tensor(self) -> Tensor:
        """The tensor again; autograd asks once."""
        memory = self.layer.use(self.kept)
        return memory if self.strides is None else memory.as_strided(self.shape, self.strides)


class Waiting:
    """The micro-batches of a model chunk whose backward passes have not begun. They come in the order of the forward passes.
    Each is known by its last layer, with which its backward pass begins."""

    def __init__(self) -> None:
        self._last_layers: deque[weakref.ref[LayerActivations]] = deque()

    def add(self, last: LayerActivations) -> None:
        """A forward pass has ended."""
        self._last_layers.append(weakref.ref(last))

    def next(self) -> LayerActivations | None:
        """The last layer of the first of them."""
        while self._last_layers:
            last = self._last_layers[0]()
            if last is not None and not last.in_backward:
                return last
            self._last_layers.popleft()
        return None


class ActivationOffload:
    """Moves the activations of one model's layers, on CUDA. It acts in forward passes that autograd records."""

    def __init__(self, min_elements: int) -> None:
        """Layers are attached next.

        Args:
            min_elements: smaller tensors stay on the device.
        """
        self._min_elements = min_elements
        self._streams = Streams()
        self._leaving: deque[LayerActivations] = deque()
        self._current: LayerActivations | None = None
        self._weights: set[int] = set()
        self._hooks = ExitStack()

    def attach(self, layers: Sequence[Any], names: Sequence[str]) -> None:
        """Off-load what the named parts of these layers keep.

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

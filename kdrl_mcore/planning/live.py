"""Bytes of live tensors, counted as they are allocated: in a fake world they are the plan, in a real one a measurement."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations inside `with LiveBytes() as live:` allocate, until each is freed.

    Memory that an operation allocates and frees internally (a kernel's scratch space) is not counted. Storages that are resized
    (Megatron-Core empties the outputs of norms that it recomputes) count with their new size.

    Attributes:
        now: bytes that were allocated inside the context and are alive.
        peak: the largest `now` since the start or the last `restart_peak`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start counting.

        Args:
            known: tensors that already exist; their storages are not counted.
        """
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()
        self._resize: Any = None  # torch's own, while this counts

    def __enter__(self) -> LiveBytes:
        resize, live = torch.UntypedStorage.resize_, self

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            live._resized(storage)
            return result

        self._resize, torch.UntypedStorage.resize_ = resize, followed  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in before:  # an argument that no operation in this context made already existed
            self._seen.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._allocated(tensor.untyped_storage())
        return result

    def restart_peak(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = self._sizes[storage] = [0]
        self._resized(storage)
        weakref.finalize(storage, self._freed, size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        size = self._sizes.get(storage)
        if size is not None:
            self.now += storage.nbytes() - size[0]
            size[0] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, size: list[int]) -> None:
        self.now -= size[0]

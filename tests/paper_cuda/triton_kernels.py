"""Triton's interpreter runs a kernel directly on memory: for paper CUDA a kernel is one operation on the current stream."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from tests.paper_cuda import streams
from tests.paper_cuda.dispatch import unwatched
from tests.paper_cuda.memory import Block, index_of, mark_of
from tests.support.interpreter import patch_language_once


def install() -> None:
    """Watch kernel launches, if Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import GridExecutor

    patch_language_once()
    launch = GridExecutor.__call__

    def watched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        stream = streams.current()
        tick = stream.tick()
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor):
                if index_of(tensor) is None:
                    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
                block = mark_of(tensor)
                assert isinstance(block, Block)
                block.use(tensor, stream, tick, writes=True, operation="a Triton kernel")
        with unwatched():
            return launch(executor, *args, **kwargs)

    GridExecutor.__call__ = watched

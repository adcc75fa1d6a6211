"""Functions that the ranks of the refit tests run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.support.conversion_ranks import build
from tests.support.receiver import DictServer

VICTIM = "model.layers.1.self_attn.o_proj.weight"
"""The tensor at which something goes wrong."""


def refit(
    path: str,
    layout: dict[str, Any],
    ports: dict[int, list[int]],
    *,
    colocated: bool = True,
    workers: int = 2,
    bucket_bytes: int = 10_000,
    timeout: float = 60.0,
    version: int = 3,
    dtype: str | None = None,
    catch: bool = True,
) -> dict[str, Any]:
    """Send a model's weights to the servers at `ports`, from the rank that drives them.

    Returns:
        The fields of the result, or `error`.
    """
    from kdrl_mcore.errors import RefitError
    from kdrl_mcore.rollout.refit.refit import send_weights

    parts = build(path, layout, student=True)
    servers = [DictServer(index, port) for index, port in enumerate(ports.get(dist.get_rank(), []))]
    try:
        result = send_weights(
            parts,
            servers,
            version,
            timeout,
            bucket_bytes,
            colocated=colocated,
            workers=workers,
            dtype=getattr(torch, dtype) if dtype else None,
        )
    except RefitError as error:
        if not catch:
            raise
        return {"error": str(error)}
    return asdict(result)


def refit_adapted(path: str, layout: dict[str, Any], port: int, exported: str) -> dict[str, Any]:
    """Give a model random adapters, send the model to the server that rank 0 drives, and export it."""
    from kdrl_mcore.config import LoraConfig
    from kdrl_mcore.convert.export import export_hf
    from kdrl_mcore.model.lora import adapters, add_adapters
    from kdrl_mcore.rollout.refit.refit import send_weights

    parts = build(path, layout, student=True)
    generator = torch.Generator().manual_seed(1)
    for chunk in parts.chunks:
        add_adapters(chunk, LoraConfig(rank=4), parts.groups)
    with torch.no_grad():
        for adapter in adapters(parts.chunks):
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    servers = [DictServer(0, port)] if dist.get_rank() == 0 else []
    result = send_weights(parts, servers, 3, 60.0, 10_000, colocated=True, workers=2)
    export_hf(parts, path, exported)
    return asdict(result)


def sabotage(path: str, layout: dict[str, Any], port: int, fault: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`refit` with a fault on the way; rank 0 drives the server at `port`."""
    ports = {0: [port]}
    with FAULTS[fault]():
        return refit(path, layout, ports, **settings)


@contextmanager
def _damage_a_bucket() -> Iterator[None]:
    """One bit changes between the sending rank and the receiver."""
    from kdrl_mcore.rollout.refit.writer import WeightWriter

    publish = WeightWriter.publish

    def damage(writer: Any, bucket: Any) -> None:
        if VICTIM in [piece.name for piece in bucket]:
            piece = next(piece for piece in bucket if piece.name == VICTIM)
            writer._sender.slots[writer._published % 2][piece.offset] ^= 1
        publish(writer, bucket)

    with patch.object(WeightWriter, "publish", damage):
        yield


@contextmanager
def _lose_a_tensor() -> Iterator[None]:
    """The sending rank leaves out a tensor."""
    from kdrl_mcore.rollout.refit.writer import WeightWriter

    publish = WeightWriter.publish

    def lose(writer: Any, bucket: Any) -> None:
        publish(writer, [piece for piece in bucket if piece.name != VICTIM])

    with patch.object(WeightWriter, "publish", lose):
        yield


@contextmanager
def _stop_or_kill(rank: int, with_signal: int) -> Iterator[None]:
    """Send the signal to the sending thread: if it went to the process, another thread might handle it and this one would
    continue."""
    from kdrl_mcore.rollout.refit import refit as module

    original = module.hf_tensors

    def stop(parts: Any, **settings: Any) -> Iterator[Any]:
        for name, tensor in original(parts, **settings):
            if name == VICTIM and dist.get_rank() == rank:
                signal.pthread_kill(threading.get_ident(), with_signal)
            yield name, tensor

    with patch.object(module, "hf_tensors", stop):
        yield


@contextmanager
def _unknown_parameter() -> Iterator[None]:
    from kdrl_mcore.rollout.refit import refit as module

    original = module.owned_tensors

    def lose(parts: Any) -> Any:
        owned = original(parts)
        owned.pop(VICTIM, None)
        return owned

    with patch.object(module, "owned_tensors", lose):
        yield


FAULTS = {
    "none": nullcontext,
    "damaged": _damage_a_bucket,
    "lost": _lose_a_tensor,
    "incomplete": _unknown_parameter,
    "sender stopped": partial(_stop_or_kill, 0, signal.SIGSTOP),
    "peer stopped": partial(_stop_or_kill, 1, signal.SIGSTOP),
    "sender killed": partial(_stop_or_kill, 0, signal.SIGKILL),
}

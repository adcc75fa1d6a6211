"""Check that engines without GPUs fit the machine's memory: where they do not, Linux silently kills some process."""

from __future__ import annotations

import json
from pathlib import Path

from kdrl_mcore.parallel.host_limits import free_memory

GIB = 2**30
PROCESS_GIB = 1.5
"""Memory of an engine's process before it has weights and a KV cache."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def engine_gib(model: str, dtype: str, processes: int, kv_cache_gib: float) -> float:
    """The memory that an engine without a GPU needs.

    Args:
        model: HF directory.
        dtype: dtype of the engine's weights.
        processes: processes of the engine, which share its weights.
        kv_cache_gib: the KV cache of each process.
    """
    stored = json.loads((Path(model) / "config.json").read_text())
    stored_bytes = _ITEM_BYTES.get(str(stored.get("dtype") or stored.get("torch_dtype")), 4)
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) * _ITEM_BYTES[dtype] / stored_bytes / GIB
    return weights + processes * (kv_cache_gib + PROCESS_GIB)


def tight_memory(each: float, engines: int) -> str | None:
    """A warning line if so many engines on this machine, of `each` GiB, need more memory than is free now; None if they fit."""
    free = free_memory() / GIB
    if engines * each <= free:
        return None
    return (
        f"{engines} engine(s) without a GPU need about {engines * each:.1f} GiB of this machine's memory, {each:.1f} GiB each, "
        f"and {free:.1f} GiB are free: lower rollout.vllm.replicas (by default one for each rank) or rollout.vllm.kv_cache_gib"
    )

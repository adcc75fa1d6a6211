"""Check that engines without GPUs fit the machine's memory: where they do not, Linux silently kills some process."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

GIB = 2**30
PROCESS_GIB = 1.5
"""Memory of an engine's process before it has weights and a KV cache."""
_CGROUP = Path("/sys/fs/cgroup")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def tight_memory(model: str, dtype: str, engines: int, processes: int, kv_cache_gib: float) -> str | None:
    """A warning line if the engines need more memory than is free now; None if they fit.

    Args:
        model: HF directory.
        dtype: dtype of the engines' weights.
        engines: number of engines on this machine.
        processes: processes of each engine, which share its weights.
        kv_cache_gib: the KV cache of each process.
    """
    stored = json.loads((Path(model) / "config.json").read_text())
    stored_bytes = _ITEM_BYTES.get(str(stored.get("dtype") or stored.get("torch_dtype")), 4)
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) * _ITEM_BYTES[dtype] / stored_bytes / GIB
    each = weights + processes * (kv_cache_gib + PROCESS_GIB)
    free = _free_bytes() / GIB
    if engines * each <= free:
        return None
    return (
        f"{engines} engine(s) without a GPU need about {engines * each:.1f} GiB of this machine's memory, {each:.1f} GiB each, "
        f"and {free:.1f} GiB are free: lower rollout.vllm.replicas (by default one for each rank) or rollout.vllm.kv_cache_gib"
    )


def _free_bytes() -> int:
    """Free memory of the machine, or of the container or job (a version 2 control group) that limits this process."""
    free: int = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)

"""Read torch's flight recorder: which collectives a rank has begun, which it waits in, and how long they took.

On CUDA the main thread runs ahead of the GPU and waits in any call that reads a result (`.item()`, `.cpu()`). Its Python frame
does not show whether the GPU is working or waiting for other ranks' GPUs; NCCL's recorder does. Everything here except
`read_recorder` is a pure function of the recorder's dumps (version 2 of torch's format, which gloo's recorder shares).
"""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

Dump = Mapping[str, Any]


@dataclass(frozen=True)
class Recorded:
    """Where one rank stands in its collectives.

    Attributes:
        begun: for each group, the number of the last collective that the rank has called.
        waits_in: the groups in which a kernel has started but not ended, that is, waits for those of other ranks. For each
            group, the number of the first such collective (0 for a send or a receive) and the group's ranks.
    """

    begun: dict[str, int] = field(default_factory=dict)
    waits_in: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


def read_recorder() -> Dump | None:
    """The dump of this process's NCCL recorder. None on CPU, where the frame shows a wait, and if the recorder cannot be read,
    which is logged once."""
    if not torch.cuda.is_available():
        return None
    read = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    off = any(os.environ.get(name) == "0" for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"))
    dump = {} if read is None or off else json.loads(read(includeCollectives=True, onlyActive=False))
    if not str(dump.get("version", "")).startswith("2."):
        _warn_unreadable()
        return None
    return dump


def ranks_of_groups() -> dict[str, list[int]]:
    """The global ranks of this process's groups, by the recorder's names for the groups."""
    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks.get(group, [])) for group, name in world.pg_names.items()}


@cache
def _warn_unreadable() -> None:
    logger.warning(
        "NCCL's flight recorder cannot be read (TORCH_FR_BUFFER_SIZE is 0, or torch's format is new): hanging and slow ranks "
        "can be found only by their Python frames, in which on CUDA every rank appears to be working"
    )


def recorded(dump: Dump, ranks_of: Mapping[str, list[int]]) -> Recorded:
    """Where the rank with this dump stands; `ranks_of` holds the ranks of its groups."""
    begun: dict[str, int] = {}
    waits_in: dict[str, tuple[int, list[int]]] = {}
    for entry in sorted(dump.get("entries", []), key=lambda entry: entry["record_id"]):
        group = entry["process_group"][0]
        number = 0 if entry["is_p2p"] else entry["collective_seq_id"]
        begun[group] = max(begun.get(group, 0), number)
        if _waits(entry):
            waits_in.setdefault(group, (number, ranks_of.get(group, [])))
    return Recorded(begun, waits_in)


def not_come(standing: Mapping[int, Recorded]) -> set[int]:
    """The ranks that have not called a collective in which another one waits."""
    return {
        rank
        for other in standing.values()
        for group, (number, ranks) in other.waits_in.items()
        for rank in ranks
        if rank in standing and standing[rank].begun.get(group, 0) < number
    }


def seconds_in_collectives(dump: Dump, after: int, phases: Sequence[tuple[int, str]]) -> tuple[dict[str, float], int]:
    """The GPU's seconds in collectives by phase, from start to end on this rank; most of this time it waits for other ranks.

    The recorder keeps only the latest collectives: if it has overwritten some, the others are scaled up to stand for all.

    Args:
        after: the number of the last record already counted.
        phases: when each phase began, in nanoseconds since the epoch, ascending, and its name.

    Returns:
        The seconds, and the number of the last record counted. An incomplete record and those after it are left for later.
    """
    seconds: defaultdict[str, float] = defaultdict(float)
    counted, last = 0, after
    begins = [begin for begin, _ in phases]
    for entry in sorted(dump.get("entries", []), key=lambda entry: entry["record_id"]):
        if entry["record_id"] <= after:
            continue
        if not _is_complete(entry):
            break
        counted, last = counted + 1, entry["record_id"]
        index = bisect_right(begins, entry["time_created_ns"]) - 1
        if index >= 0:
            seconds[phases[index][1]] += entry.get("duration_ms", 0.0) / 1e3
    share = counted / (last - after) if last > after else 1.0
    return {phase: each / share for phase, each in seconds.items()}, last


def _is_complete(entry: Mapping[str, Any]) -> bool:
    return entry["state"] == "completed" or entry["retired"]


def _waits(entry: Mapping[str, Any]) -> bool:
    """Whether the kernel is running, that is, waiting for the others'. Gloo records no start: it waits from the call on."""
    return not _is_complete(entry) and (entry["state"] == "started" or entry["profiling_name"].startswith("gloo:"))

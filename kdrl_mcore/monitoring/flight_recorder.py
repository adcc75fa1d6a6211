"""What torch's flight recorder knows: which collectives a rank has begun, which it waits in, and how long they took.

On CUDA the main thread runs ahead of the GPU and waits in whatever reads a result (`.item()`, `.cpu()`): its Python frame does
not tell whether the GPU works or waits for other ranks' GPUs. NCCL's recorder does. Everything here but `read_recorder` is a
pure function of its dumps (version 2 of torch's format; gloo's has the same).
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
        begun: by group, the number of the last collective that the rank has called.
        waits_in: the groups in which a kernel has started and not ended, that is, waits for the other ranks': by group, the
            number of the first such collective, or 0 where it is a send or a receive, and the group's ranks.
    """

    begun: dict[str, int] = field(default_factory=dict)
    waits_in: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


def read_recorder() -> Dump | None:
    """NCCL's recorder of this process. None on CPU, where a wait shows in the frame, and, told once, if it cannot be read."""
    if not torch.cuda.is_available():
        return None
    read = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
    off = any(os.environ.get(name) == "0" for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"))
    dump = {} if read is None or off else json.loads(read(includeCollectives=True, onlyActive=False))
    if not str(dump.get("version", "")).startswith("2."):
        _tell_that_it_is_off()
        return None
    return dump


def ranks_of_groups() -> dict[str, list[int]]:
    """The global ranks of this process's groups, by the names under which the recorder has them."""
    world = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks.get(group, [])) for group, name in world.pg_names.items()}


@cache
def _tell_that_it_is_off() -> None:
    logger.warning(
        "NCCL's flight recorder cannot be read (TORCH_FR_BUFFER_SIZE is 0, or torch's format is new): hanging and slow ranks "
        "are told by their Python frames alone, which on CUDA show every rank at work"
    )


def recorded(dump: Dump, ranks_of: Mapping[str, list[int]]) -> Recorded:
    """Where the rank with this dump stands; `ranks_of` has the ranks of its groups."""
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
    """The GPU's seconds in collectives by phase, from their beginning to their end on this rank: work of others, mostly.

    The recorder keeps the latest collectives only: where it has overwritten some, those it has stand for all.

    Args:
        after: the number of the last record that was counted before.
        phases: when each phase began, in nanoseconds since the epoch, ascending, and its name.

    Returns:
        The seconds, and the number of the last record counted; a record that is not complete, and what follows, comes later.
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
        place = bisect_right(begins, entry["time_created_ns"]) - 1
        if place >= 0:
            seconds[phases[place][1]] += entry.get("duration_ms", 0.0) / 1e3
    share = counted / (last - after) if last > after else 1.0
    return {phase: each / share for phase, each in seconds.items()}, last


def _is_complete(entry: Mapping[str, Any]) -> bool:
    return entry["state"] == "completed" or entry["retired"]


def _waits(entry: Mapping[str, Any]) -> bool:
    """Its kernel runs, that is, waits for the others'. Gloo records no start: its thread waits from the call on."""
    return not _is_complete(entry) and (entry["state"] == "started" or entry["profiling_name"].startswith("gloo:"))

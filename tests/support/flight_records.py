"""Records of NCCL's flight recorder, as torch writes them."""

from __future__ import annotations

from typing import Any

SECOND = 10**9


def entry(record: int, group: str, number: int, state: str = "completed", **others: Any) -> dict[str, Any]:
    """A record as torch writes it, without the fields that are not read."""
    return {
        "record_id": record,
        "process_group": [group, "undefined"],
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": "nccl:all_reduce",
        "state": state,
        "retired": state == "completed",
        "time_created_ns": record * SECOND,
        **others,
    }


def dump(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"version": "2.10", "entries": list(entries)}

"""A connection to the job's store that does not wait for other users of it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


def own_store(timeout: timedelta = timedelta(minutes=5)) -> dist.Store | None:
    """The job's store over a separate connection, without torch's key prefixes; before there is a world, torchrun's store. None
    if there is neither. Not collective.

    Args:
        timeout: the time-out for connecting and for every call.

    Raises:
        RuntimeError: the process with the store has ended.
    """
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        return _connect(store.host, store.port, timeout) if isinstance(store, dist.TCPStore) else store
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return _connect(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout)


def _connect(host: str, port: int, timeout: timedelta) -> dist.Store:
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)

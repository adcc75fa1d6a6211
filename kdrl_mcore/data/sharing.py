"""Data that one rank on each machine reads and the other ranks there share through a memory-mapped file."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist

from kdrl_mcore.data.table import PromptTable, schema
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.parallel.collect import gather_objects

logger = logging.getLogger(__name__)


def once_per_node(load: Callable[[], list[PromptTable]]) -> list[PromptTable]:
    """The tables that `load` returns, on every rank. The first rank on each machine loads them and writes temporary files,
    which the other ranks map into their memory before they are removed. If they cannot be written, each rank loads the tables
    itself. Collective over the world.

    Raises:
        KdrlError: on every rank, if loading failed on one.
    """
    host = socket.gethostname()
    hosts = gather_objects(host)
    leads = hosts.index(host) == dist.get_rank()
    has_others = hosts.count(host) > 1
    tables: list[PromptTable] = []
    failure: KdrlError | None = None
    shared: list[tuple[str, PromptTable]] | None = None
    with ExitStack() as stack:
        if leads:
            try:
                tables = load()
            except KdrlError as error:
                failure = error
            if has_others and failure is None:
                shared = _write(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdrl_data_"))), tables)
        everywhere = gather_objects((failure, shared))
        for other, _ in everywhere:
            if other is not None:
                raise other
        if not leads:
            tables = _read(everywhere[hosts.index(host)][1]) or load()
        dist.barrier()  # all have opened the files, which can now be removed
    return tables


def _write(folder: Path, tables: list[PromptTable]) -> list[tuple[str, PromptTable]] | None:
    """The file of each table, and the table without its columns."""
    try:
        for number, table in enumerate(tables):
            table.write(folder / str(number))
    except OSError as error:
        logger.warning("each rank reads the data itself, as it cannot be shared through %s: %s", folder.parent, error.strerror)
        return None
    empty = schema().empty_table()
    return [
        (str(folder / str(number)), PromptTable(table.source, table.name, table.domain, empty, table.dropped))
        for number, table in enumerate(tables)
    ]


def _read(shared: list[tuple[str, PromptTable]] | None) -> list[PromptTable] | None:
    """The tables in the files; None if they are not on this machine (two machines with the same name)."""
    import pyarrow as pa

    try:
        return None if shared is None else [table.read(Path(path)) for path, table in shared]
    except (OSError, pa.ArrowException):
        return None

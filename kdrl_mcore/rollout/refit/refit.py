"""Refit: stream the student's current weights from Megatron's shards to the engines, in buckets, under their HF names.

Each tensor of the model has one owner rank that sends it (`owned_tensors`). Owners take turns, layer by layer: an engine keeps
a layer's tensors until it has all of them, so it never has more than one incomplete layer. An owner fills bucket after bucket,
gathering one parameter at a time over its tensor-parallel group. Every rank that serves workers of an engine gets each bucket
by a broadcast over the world, unless the owner is the only such rank, and passes it on (`writer.py`): the worker of a colocated
engine gets it from the rank whose GPU it shares, the workers of a server from the rank that drives the server. No rank holds
more than two buckets and one parameter of each owner for which it gathers, and nothing is written to disk.
"""

from __future__ import annotations

import itertools
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.convert.byte_ranges import num_elements, raw_bytes
from kdrl_mcore.convert.export import hf_tensors, mapped_parameters, owned_tensors
from kdrl_mcore.convert.peft_files import peft_config
from kdrl_mcore.convert.peft_folder import factor_names, factor_shapes, owned_factors, whole_factors
from kdrl_mcore.convert.weight_map import global_tensors
from kdrl_mcore.errors import RefitError
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.gpt import ModelParts
from kdrl_mcore.parallel.collect import gather_objects
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.rollout.refit.stream import checksum, cut, digest, num_bytes
from kdrl_mcore.rollout.refit.writer import Table, WeightServer, WeightWriter

_SERVERS_SHARE = 0.8
"""The servers' share of the time-out; the rest is for the ranks to agree on the error."""
_SILENCE = 2.0
"""Seconds within which all ranks begin a refit."""
_calls = itertools.count()


@dataclass(frozen=True)
class RefitResult:
    """The result of a refit.

    Attributes:
        version: the number of updates that the sent weights have received.
        num_bytes, num_tensors: the size of the model, counted once.
        seconds: the duration on this rank.
        digest: the digest of all tensors, which every worker of every engine has confirmed.
    """

    version: int
    num_bytes: int
    num_tensors: int
    seconds: float
    digest: str


def send_weights(
    parts: ModelParts,
    servers: Sequence[WeightServer],
    version: int,
    timeout: float,
    bucket_bytes: int,
    *,
    colocated: bool,
    workers: int = 1,
    dtype: torch.dtype | None = None,
    lora: LoraConfig | None = None,
) -> RefitResult:
    """Send the student's current weights to every engine. Collective over the world.

    Args:
        servers: the engines that this rank drives; most ranks have none, and at most one if they are colocated.
        version: the number of updates that these weights have received.
        timeout: seconds until the refit fails on every rank.
        colocated: an engine runs on the host of the rank that drives it, and on CUDA on the GPUs of that rank and the
            `workers` - 1 ranks after it, one worker on each. The weights then go through memory, from each of these ranks to
            the worker on its GPU; otherwise through the network.
        workers: the number of workers of each colocated engine.
        dtype: the engines' dtype; by default the student's.
        lora: send these adapters alone, to engines that have their base; None sends whole weights, with adapters merged into
            them.

    Raises:
        RefitError: on every rank; the message names the tensor and the engine or rank that was waited for. If a rank does not
            answer at all, the process group is unusable. The engines' weights are then unknown: they must not be used until a
            refit has succeeded.
    """
    call = next(_calls)
    deadline = time.monotonic() + timeout * _SERVERS_SHARE
    refit = _Refit(parts, servers, version, deadline, bucket_bytes, workers if colocated else None, dtype, lora)
    result = _run_within(timeout, refit.run)
    if result is None:
        raise RefitError(f"refit to version {version} did not end within {timeout:g} s: {_silent_ranks(call, refit.waits_for)}")
    return result


@dataclass
class _Refit:
    """One refit on one rank. `waits_for` names what the rank is waiting for."""

    parts: ModelParts
    servers: Sequence[WeightServer]
    version: int
    deadline: float
    bucket_bytes: int
    workers: int | None  # of each colocated engine; None: the engines are reached through the network
    dtype: torch.dtype | None
    lora: LoraConfig | None = None
    waits_for: str = "the other ranks to begin"
    checksums: dict[str, str] = field(default_factory=dict)
    is_expert: dict[str, bool] = field(default_factory=dict)  # of this rank's HF names
    uncast: set[str] = field(default_factory=set)  # those of them that are sent in their own dtype
    scratch: Tensor | None = None
    streams: dict[int, Iterator[tuple[str, Tensor | None]]] = field(default_factory=dict)  # by owner

    def run(self) -> RefitResult:
        begin = time.perf_counter()
        if self.lora is None:
            rules = {name: mapped.rule for mapped in mapped_parameters(self.parts) for name in mapped.hf_names}
            self.is_expert = {name: rule.is_expert for name, rule in rules.items()}
            self.uncast = {name for name, rule in rules.items() if rule.keeps_dtype or self.dtype is None}
            own = owned_tensors(self.parts)
        else:
            self.is_expert = dict.fromkeys(factor_shapes(self.parts), False)
            self.uncast = set(self.is_expert if self.dtype is None else ())
            own = owned_factors(self.parts)
        owned = {
            name: (shape, str(dtype if name in self.uncast else self.dtype).removeprefix("torch."))
            for name, (shape, dtype) in own.items()
        }
        everyone = gather_objects((owned, [server.index for server in self.servers]))
        table: Table = {name: described for tensors, _ in everyone for name, described in tensors.items()}
        self._check_complete([name for tensors, _ in everyone for name in tensors], table)
        engines = {rank: indices for rank, (_, indices) in enumerate(everyone) if indices}  # by the rank that drives them
        if not engines:
            return RefitResult(self.version, 0, 0, time.perf_counter() - begin, "")
        writer = None
        try:
            writer = self._open_writer(engines, table)
            owned_by_rank = [tensors for tensors, _ in everyone]
            served = [rank + worker for rank in engines for worker in range(self.workers or 1)]
            for rank, tensors in _turns(owned_by_rank):
                self._take_turn(rank, tensors, owned_by_rank[rank], writer, shared=served != [rank])
            self.waits_for = "the other ranks to have sent everything"
            sent = {name: value for checksums in gather_objects(self.checksums) for name, value in checksums.items()}
            total = digest(table, sent)
            if writer is not None:
                self.waits_for = "its engines to load the last tensors"
                writer.finish(sent, total)
        finally:
            if writer is not None:
                writer.close()
        self.waits_for = "the other ranks to report their results"
        for rank, error in enumerate(gather_objects(None if writer is None else writer.error)):
            if error is not None:
                raise RefitError(f"refit to version {self.version} failed on rank {rank}, {error}")
        size = sum(_num_bytes(*described) for described in table.values())
        return RefitResult(self.version, size, len(table), time.perf_counter() - begin, total)

    def _open_writer(self, engines: Mapping[int, list[int]], table: Table) -> WeightWriter | None:
        """This rank's writer, connected to the workers it serves; None if it serves none. Collective over the world."""
        rank = dist.get_rank()
        driver = next((each for each in engines if each <= rank < each + (self.workers or 1)), None)
        writer = None
        if driver is not None:
            self.waits_for = "the connection of its engines"
            writer = WeightWriter(
                engines[driver],
                self.servers,
                None if self.workers is None else rank - driver,
                self.version,
                table,
                self.bucket_bytes,
                device(),
                self.deadline,
                None if self.lora is None else peft_config(self.lora, ""),
            )
        addresses = gather_objects(None if writer is None else writer.address)
        if writer is not None and driver is not None:
            writer.open(addresses[driver : driver + (self.workers or 1)])
        return writer

    def _take_turn(self, owner: int, tensors: Table, all_owned: Table, writer: WeightWriter | None, shared: bool) -> None:
        """Send some tensors of one owner. The ranks of its tensor-parallel group iterate in step, parameter by parameter."""
        owns = dist.get_rank() == owner
        stream, names = self._stream(owner, all_owned)
        current, data = "", torch.empty(0)
        for bucket in cut({name: _num_bytes(*described) for name, described in tensors.items()}, self.bucket_bytes):
            slot = self._slot(writer) if owns or shared or writer else None
            for entry in bucket:
                self.waits_for = f"rank {owner}, tensor {entry.name}"
                while entry.name in names and current != entry.name:
                    current, tensor = next(stream)
                    if owns and current == entry.name:
                        assert tensor is not None
                        data = raw_bytes(tensor if current in self.uncast else tensor.to(self.dtype))
                        self.checksums[current] = checksum(data)
                if owns and slot is not None:
                    slot[entry.offset : entry.offset + entry.length].copy_(data[entry.start : entry.start + entry.length])
            if shared and slot is not None:
                dist.broadcast(slot[: num_bytes(bucket)], src=owner)
            if writer is not None:
                writer.publish(bucket)

    def _stream(self, owner: int, tensors: Table) -> tuple[Iterator[tuple[str, Tensor | None]], set[str]]:
        """The iterator that this rank advances in all turns of the owner, and the names of the owner's tensors that occur in
        it."""
        gathered = {name for name in tensors if not self.is_expert.get(name, True)}  # over the owner's tensor-parallel group
        if dist.get_rank() == owner:
            stream, names = partial(self._tensors, experts_only=not gathered), set(tensors)
        elif owner in dist.get_process_group_ranks(self.parts.groups.tensor) and gathered:
            stream, names = partial(self._tensors), gathered
        else:
            return iter(()), set()
        if owner not in self.streams:
            self.streams[owner] = stream()
        return self.streams[owner], names

    def _tensors(self, *, experts_only: bool = False) -> Iterator[tuple[str, Tensor | None]]:
        return hf_tensors(self.parts, experts_only=experts_only) if self.lora is None else whole_factors(self.parts)

    def _slot(self, writer: WeightWriter | None) -> Tensor:
        if writer is not None:
            return writer.next_slot()
        if self.scratch is None:
            self.scratch = torch.empty(self.bucket_bytes, dtype=torch.uint8, device=device())
        return self.scratch

    def _check_complete(self, names: Sequence[str], table: Table) -> None:
        """Check that the ranks own exactly the architecture's tensors, each once."""
        architecture = self.parts.architecture
        expected: dict[str, tuple[int, ...] | None] = {
            name: tuple(shape)
            for tensor in global_tensors(FAMILIES[architecture.family].rules(architecture), architecture)
            for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
        }
        if self.lora is not None:
            expected = dict.fromkeys(factor_names(architecture, self.lora))
        counts = Counter(names)
        for name in sorted(expected.keys() | table.keys()):
            if counts[name] != 1 or name not in expected or expected[name] not in (None, tuple(table[name][0])):
                raise RefitError(
                    f"tensor {name}: the architecture has shape {expected.get(name)}, but the ranks own "
                    f"{[tuple(table[name][0])] * names.count(name) if name in table else 'none'}"
                )


def _turns(owned_by_rank: Sequence[Table]) -> list[tuple[int, Table]]:
    """The order in which ranks send their tensors: layer by layer, and within a layer rank by rank. Adjacent turns of the same
    rank are one.

    Args:
        owned_by_rank: the tensors of each rank in its order: those before the layers, the layers in order, the rest.
    """
    parts: dict[tuple[int, int], dict[str, tuple[Sequence[int], str]]] = {}
    for rank, tensors in enumerate(owned_by_rank):
        layer = -1
        for name, described in tensors.items():
            found = re.search(r"\.layers\.(\d+)\.", name)
            layer = int(found[1]) if found else layer if layer in (-1, sys.maxsize) else sys.maxsize
            parts.setdefault((layer, rank), {})[name] = described
    turns: list[tuple[int, dict[str, tuple[Sequence[int], str]]]] = []
    for layer, rank in sorted(parts):
        if not turns or turns[-1][0] != rank:
            turns.append((rank, {}))
        turns[-1][1].update(parts[layer, rank])
    return list(turns)


def _num_bytes(shape: Sequence[int], dtype: str) -> int:
    return num_elements(tuple(shape)) * getattr(torch, dtype).itemsize


def _run_within(timeout: float, function: Callable[[], RefitResult]) -> RefitResult | None:
    """Run a function in a thread; at the time-out abandon the thread and return None. So the collectives in which it may hang
    need no time-out."""
    outcome: list[RefitResult | BaseException] = []
    index = torch.cuda.current_device() if device().type == "cuda" else None

    def run() -> None:
        try:
            if index is not None:
                torch.cuda.set_device(index)
            with torch.no_grad():
                outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="refit", daemon=True)
    thread.start()
    thread.join(timeout)
    if not outcome:
        return None
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _silent_ranks(call: int, waited_for: str) -> str:
    """Which ranks do not even report their time-out, and what this rank waited for. Uses the process group's store, for which
    no other rank is needed."""
    store = dist.PrefixStore(f"kdrl_mcore/refit/{call}", dist.distributed_c10d._get_default_store())
    store.set(str(dist.get_rank()), "late")
    give_up = time.monotonic() + _SILENCE
    silent = list(range(dist.get_world_size()))
    while silent and time.monotonic() < give_up:
        silent = [rank for rank in silent if not store.check([str(rank)])]
        time.sleep(0.05)
    who = f"rank {', '.join(map(str, silent))} does not answer" if silent else "every rank answers, but too late"
    return f"{who}; rank {dist.get_rank()} waited for {waited_for}"

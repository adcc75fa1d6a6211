"""Both ends of a refit in threads: each worker of a colocated engine is served by its own rank, and failures are reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from kdrl_mcore.convert.byte_ranges import raw_bytes
from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.refit import transport as weight_transport
from kdrl_mcore.rollout.refit.stream import checksum, cut, digest
from kdrl_mcore.rollout.refit.transport import CudaIpcReceiver, CudaIpcSender
from kdrl_mcore.rollout.refit.writer import WeightWriter
from tests.support.receiver import DictWorker

TENSORS = {"one": torch.arange(40.0), "two": torch.arange(9.0)}
TABLE = {name: (list(tensor.shape), "float32") for name, tensor in TENSORS.items()}
BUCKET = 64
DEADLINE = 30.0


class Server:
    """An engine whose workers are threads."""

    index = 5
    address: str | None = "127.0.0.1:1"

    def __init__(self, workers: int) -> None:
        self.workers = [DictWorker(rank, workers) for rank in range(workers)]

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(self.workers)) as pool:
            answers = list(pool.map(lambda worker: worker.try_to_receive_weights(dict(spec)), self.workers))
        errors = [answer["error"] for answer in answers if "error" in answer]
        if errors:
            raise RefitError(errors[0])
        return answers


class Refusing(Server):
    """An engine that never asks its workers."""

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        raise RefitError("asleep")


def send(server: Server, ranks: int, publish: Callable[[WeightWriter, Any], None] = WeightWriter.publish) -> list[WeightWriter]:
    """The ranks of a colocated engine as threads; the first one drives the engine."""
    deadline = time.monotonic() + DEADLINE
    writers = [
        WeightWriter([server.index], [] if rank else [server], rank, 1, TABLE, BUCKET, torch.device("cpu"), deadline)
        for rank in range(ranks)
    ]
    addresses = [writer.address for writer in writers]

    def feed(writer: WeightWriter) -> None:
        writer.open(addresses)
        for bucket in cut({name: tensor.nbytes for name, tensor in TENSORS.items()}, BUCKET):
            slot = writer.next_slot()
            for piece in bucket:
                data = raw_bytes(TENSORS[piece.name])[piece.start : piece.start + piece.length]
                slot[piece.offset : piece.offset + piece.length].copy_(data)
            publish(writer, bucket)
        sums = {name: checksum(raw_bytes(tensor)) for name, tensor in TENSORS.items()}
        writer.finish(sums, digest(TABLE, sums))

    try:
        with ThreadPoolExecutor(ranks) as pool:
            list(pool.map(feed, writers))
        for writer in writers:
            vars(writer)["served"] = list(writer._channels)
        return writers
    finally:
        for writer in writers:
            writer.close()


def test_each_worker_is_served_by_the_rank_whose_gpu_it_shares() -> None:
    server = Server(2)
    writers = send(server, 2)
    assert [writer.error for writer in writers] == [None, None]
    assert [vars(writer)["served"] for writer in writers] == [[(0, 0)], [(0, 1)]]
    for worker in server.workers:
        assert worker.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(worker.tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_server_that_refuses_is_heard_of_by_every_rank_at_once() -> None:
    """The ranks that do not drive the engine wait for workers that nobody sent."""
    begin = time.monotonic()
    writers = send(Refusing(2), 2)
    assert all("asleep" in str(writer.error) for writer in writers), [writer.error for writer in writers]
    assert time.monotonic() - begin < DEADLINE / 2


def test_as_many_workers_as_ranks_that_serve_them() -> None:
    for writer in send(Server(3), 2):
        assert "the engine has 3 workers, but 2 ranks serve them" in str(writer.error)


def test_what_one_rank_damages_fails_the_refit_by_the_server_s_answer() -> None:
    def damage(writer: WeightWriter, bucket: Any) -> None:
        if writer._worker == 1 and writer._sender is not None:
            writer._sender.slots[writer._published % 2][0] ^= 1
        WeightWriter.publish(writer, bucket)

    driver, _ = send(Server(2), 2, damage)
    assert "tensor one is damaged" in str(driver.error)


def test_slots_lie_outside_segments_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other settings stay, and all are restored afterwards."""
    before = "max_split_size_mb:512,expandable_segments:True"
    original = torch._C._accelerator_getAllocatorSettings()
    torch._C._accelerator_setAllocatorSettings(before)
    seen: list[str] = []

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch._C._accelerator_getAllocatorSettings())
        return torch.zeros(*args, **kwargs)

    monkeypatch.setattr(weight_transport.torch, "empty", empty)
    try:
        CudaIpcSender(8, torch.device("cpu"))
        assert seen == ["max_split_size_mb:512,expandable_segments:False"] * 2
        assert torch._C._accelerator_getAllocatorSettings() == before
    finally:
        torch._C._accelerator_setAllocatorSettings(original)


def test_a_worker_on_another_gpu_than_its_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"uuid": f"GPU-{device.index}"})
    )
    with pytest.raises(RefitError, match="worker runs on GPU GPU-1, the rank that serves it on GPU GPU-0"):
        CudaIpcReceiver({"gpu": "GPU-0", "slots": []}, torch.device("cuda", 1))

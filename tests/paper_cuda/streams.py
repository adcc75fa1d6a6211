"""Streams and events as vector clocks: which work is known to have finished when other work begins.

A stream counts the work given to it. Its clock says how much of every stream's work precedes its own next work; waiting for a
stream or an event merges the other's clock into it. The host is one more stream, whose clock advances when it synchronises.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from typing import Any

import torch

Clock = dict[int, int]
HOST_ID = -1
_ids = itertools.count(HOST_ID)


class PaperCudaError(RuntimeError):
    """What CUDA would silently corrupt, and mistakes in the use of paper CUDA itself."""


class Stream:
    """Stands in for `torch.cuda.Stream`; the host is also one."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.id = next(_ids)
        self.clock: Clock = {}
        self.device_index = current_index()
        self.device = torch.device("cuda", self.device_index)
        self.stream_id = self.cuda_stream = self.id
        self.priority = priority
        self._outer: list[Stream] = []
        _all.add(self)

    def tick(self) -> int:
        """The number of the stream's next work, which begins after everything that the host knows to have finished or has done
        itself."""
        if self is not host:
            merge(self.clock, host.clock)
        self.clock[self.id] = self.clock.get(self.id, 0) + 1
        return self.clock[self.id]

    def wait_stream(self, other: Stream) -> None:
        """Later work begins after the work that the other stream has so far."""
        merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        """Later work begins after the event."""
        merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        """An event after the work that the stream has so far."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits for the stream."""
        merge(host.clock, self.clock)

    def query(self) -> bool:
        """Whether its work is known to have finished, given what the host has waited for."""
        return host.clock.get(self.id, 0) >= self.clock.get(self.id, 0)

    def __enter__(self) -> Stream:
        self._outer.append(current())
        _local.stream = self
        return self

    def __exit__(self, *_: Any) -> None:
        _local.stream = self._outer.pop()


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.clock: Clock = {}
        self.recorded = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Record the event after the work that the stream (by default the current one) has so far."""
        stream = stream or current()
        merge(stream.clock, host.clock)
        self.clock = dict(stream.clock)
        self.recorded = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """The stream (by default the current one) waits for the event."""
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits for the event."""
        merge(host.clock, self.clock)

    def query(self) -> bool:
        """Whether the event is known to have passed, given what the host has waited for."""
        return all(host.clock.get(stream, 0) >= count for stream, count in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between the two events by the host's clock, which is in order with everything."""
        return (end.recorded - self.recorded) * 1e3


def merge(clock: Clock, other: Clock) -> None:
    """Make `clock` come after `other` too."""
    for stream, count in other.items():
        if clock.get(stream, 0) < count:
            clock[stream] = count


_local = threading.local()


def current() -> Stream:
    """The calling thread's current stream; the default stream unless the thread chose another."""
    return getattr(_local, "stream", default)


def set_current(stream: Stream) -> None:
    """`torch.cuda.set_stream`."""
    _local.stream = stream


def synchronize_device() -> None:
    """The host waits for all streams."""
    for stream in list(_all):
        merge(host.clock, stream.clock)


def current_index() -> int:
    """The index of this thread's GPU."""
    return getattr(_local, "index", _process_index[0])


def set_index(index: int) -> None:
    """`torch.cuda.set_device`. A thread that never called it uses what the main thread chose."""
    _local.index = index
    if threading.current_thread() is threading.main_thread():
        _process_index[0] = index


_process_index = [0]
_all: weakref.WeakSet[Stream] = weakref.WeakSet()
host = Stream()
default = Stream()

"""How fast a GPU and its links are in practice: the vendor's numbers times one share for each kind of work.

The shares hold for every cluster, model and row of the comparison with published runs: none is fitted to a row. They are round
numbers, chosen with those rows in view.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kdrl_mcore.config import ClusterConfig
from kdrl_mcore.errors import ConfigError

MATMUL_SHARE = 0.65
"""Of the peak: large bfloat16 matrix products on an H100 at its power limit reach some 650 of 989 TFLOP/s."""
FP8_SHARE = 0.55
"""The same in FP8, with per-tensor scaling: the power limit binds harder."""
ATTENTION_SHARE = 0.50
"""Of the bfloat16 peak in causal flash attention (arXiv 2307.08691 and 2407.08608: 50 to 60 % on an H100 at head size 128)."""
MEMORY_SHARE = 0.80
"""Of the memory's bandwidth, in element-wise kernels and in reading weights."""
CACHE_SHARE = 0.50
"""Of the memory's bandwidth, in reading a paged KV cache of sequences of different lengths."""
LINK_SHARE = 0.75
"""Of a link's bandwidth, in NCCL's collectives on large messages."""
HOST_SHARE = 0.75
"""Of PCIe, from pinned memory."""
LAUNCH = 5e-6
"""Seconds to launch one kernel from Python and C++, where no CUDA graph does it."""
MESSAGE = 20e-6
"""Seconds of one small collective within a node."""
FLOP, MEMORY, NETWORK, HOST, LATENCY, CPU = "FLOP", "memory bandwidth", "network", "PCIe", "latency", "CPU"
"""What can rule a phase."""


class Seconds(defaultdict[str, float]):
    """Seconds by what rules them; they add up and scale."""

    def __init__(self, **seconds: float) -> None:
        super().__init__(float)
        self.update(seconds)

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.values())

    @property
    def bound(self) -> str:
        """What most of them are ruled by."""
        return max(self, key=self.__getitem__) if self.total else "-"

    def __add__(self, other: Seconds) -> Seconds:
        result = Seconds()
        for part in (self, other):
            for bound, seconds in part.items():
                result[bound] += seconds
        return result

    def __mul__(self, factor: float) -> Seconds:
        result = Seconds()
        result.update({bound: seconds * factor for bound, seconds in self.items()})
        return result

    __rmul__ = __mul__


@dataclass(frozen=True)
class Rates:
    """Seconds of a piece of work on one GPU of a cluster."""

    cluster: ClusterConfig
    fp8: bool = False

    def __post_init__(self) -> None:
        if not self.cluster.peak_tflops:
            raise ConfigError("the cluster's GPU is not described: add cluster=h100 (or h200, b200, a100), or set cluster.*")
        if self.fp8 and not self.cluster.fp8_peak_tflops:
            raise ConfigError(f"{self.cluster.name} has no FP8 (cluster.fp8_peak_tflops is 0)")

    def matmul(self, flop: float) -> float:
        """Large matrix products."""
        if self.fp8:
            return flop / (self.cluster.fp8_peak_tflops * 1e12 * FP8_SHARE)
        return flop / (self.cluster.peak_tflops * 1e12 * MATMUL_SHARE)

    def attention(self, flop: float) -> float:
        """Flash attention, bfloat16 also where the matrix products are FP8."""
        return flop / (self.cluster.peak_tflops * 1e12 * ATTENTION_SHARE)

    def memory(self, num_bytes: float, share: float = MEMORY_SHARE) -> float:
        """Traffic to and from the GPU's memory."""
        return num_bytes / (self.cluster.memory_gbs * 1e9 * share)

    def host(self, num_bytes: float) -> float:
        """Copies between GPU and host."""
        return num_bytes / (self.cluster.host_gbs * 1e9 * HOST_SHARE)

    def link(self, num_bytes: float, ranks: int, stride: int) -> float:
        """Bytes that one GPU sends to others of a group of `ranks` that lie `stride` apart.

        Groups that span nodes go round a ring that leaves each node once, over the adapters of all the group's GPUs there.
        """
        per_node = self.cluster.gpus_per_node
        if ranks == 1 or num_bytes == 0:
            return 0.0
        if ranks * stride <= per_node:
            rate = self.cluster.node_gbs
        else:
            rate = min(self.cluster.node_gbs, self.cluster.network_gbs * max(1, per_node // stride))
        return num_bytes / (rate * 1e9 * LINK_SHARE)

    def ring(self, num_bytes: float, ranks: int, stride: int) -> float:
        """An all-gather to, or a reduce-scatter from, `num_bytes` on every rank."""
        return self.link(num_bytes * (ranks - 1) / ranks, ranks, stride)

"""The speed of a GPU and its links in practice: the vendor's numbers times one share for each kind of work.

The shares are the same for every cluster and model and for every row of the comparison with published runs. They are round
numbers, chosen with those rows in view, but none is fitted to a single row.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from kdrl_mcore.config import ClusterConfig
from kdrl_mcore.errors import ConfigError

MATMUL_SHARE = 0.65
"""The share of the peak in large bfloat16 matrix products: an H100 at its power limit reaches about 650 of 989 TFLOP/s."""
FP8_SHARE = 0.55
"""The same in FP8 with per-tensor scaling, where the power limit is more restrictive."""
ATTENTION_SHARE = 0.50
"""The share of the bfloat16 peak in causal flash attention (arXiv 2307.08691 and 2407.08608: 50 to 60 % on an H100 at head
size 128)."""
MEMORY_SHARE = 0.80
"""The share of the memory bandwidth in element-wise kernels and in reading weights."""
CACHE_SHARE = 0.50
"""The share of the memory bandwidth in reading a paged KV cache of sequences of different lengths."""
LINK_SHARE = 0.75
"""The share of a link's bandwidth in NCCL's collectives on large messages."""
HOST_SHARE = 0.75
"""The share of PCIe's bandwidth from pinned memory."""
LAUNCH = 5e-6
"""Seconds to launch one kernel from Python and C++, without a CUDA graph."""
MESSAGE = 20e-6
"""Seconds of one small collective within a node."""
FLOP, MEMORY, NETWORK, HOST, LATENCY, CPU = "FLOP", "memory bandwidth", "network", "PCIe", "latency", "CPU"
"""What can limit a phase."""


class Seconds(defaultdict[str, float]):
    """Seconds by what limits the work; they can be added and scaled."""

    def __init__(self, **seconds: float) -> None:
        super().__init__(float)
        self.update(seconds)

    @property
    def total(self) -> float:
        """The sum of all."""
        return sum(self.values())

    @property
    def bound(self) -> str:
        """What limits most of them."""
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
    """The seconds that a given amount of work takes on one GPU of a cluster."""

    cluster: ClusterConfig
    fp8: bool = False

    def __post_init__(self) -> None:
        if not self.cluster.peak_tflops:
            raise ConfigError("the cluster's GPU is not specified: add cluster=h100 (or h200, b200, a100), or set cluster.*")
        if self.fp8 and not self.cluster.fp8_peak_tflops:
            raise ConfigError(f"{self.cluster.name} has no FP8 (cluster.fp8_peak_tflops is 0)")

    def matmul(self, flop: float) -> float:
        """Large matrix products."""
        if self.fp8:
            return flop / (self.cluster.fp8_peak_tflops * 1e12 * FP8_SHARE)
        return flop / (self.cluster.peak_tflops * 1e12 * MATMUL_SHARE)

    def attention(self, flop: float) -> float:
        """Flash attention, in bfloat16 even if the matrix products are in FP8."""
        return flop / (self.cluster.peak_tflops * 1e12 * ATTENTION_SHARE)

    def memory(self, num_bytes: float, share: float = MEMORY_SHARE) -> float:
        """Traffic to and from the GPU's memory."""
        return num_bytes / (self.cluster.memory_gbs * 1e9 * share)

    def host(self, num_bytes: float) -> float:
        """Copies between GPU and host."""
        return num_bytes / (self.cluster.host_gbs * 1e9 * HOST_SHARE)

    def link(self, num_bytes: float, ranks: int, stride: int) -> float:
        """Bytes that one GPU sends within a group of `ranks` ranks, `stride` apart.

        Groups that span nodes use a ring that leaves each node once, over the adapters of all the group's GPUs there.
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
        """An all-gather to `num_bytes` on every rank, or a reduce-scatter from them."""
        return self.link(num_bytes * (ranks - 1) / ranks, ranks, stride)

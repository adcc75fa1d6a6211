"""Replay of experts (R3, arXiv 2510.11370): the student's routers take the experts that the sampler chose for each token.

Rounding lets a router choose other experts in the trainer than in the sampler, which changes a token's log-prob far more than
the rounding itself. The weights of the experts are still computed from the present router, with its gradient; only the choice
is the sampler's. Only routers with an object of ours are affected, so a teacher in the same process keeps its own choices.

S rows of a micro-batch, N rows of this rank, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.model.families import Architecture
from kdrl_mcore.parallel.collectives import all_gather_single
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.parallel.packing import UNKNOWN_EXPERT
from kdrl_mcore.parallel.platform import device

ComputeTopK = Callable[..., tuple[Tensor, Tensor]]


class RouterReplay:
    """What one router does: it chooses, and its choices are recorded; or it takes given experts. Megatron-Core's router calls
    `get_replay_topk` of its `router_replay`."""

    def __init__(self) -> None:
        self.recorded: list[Tensor] | None = None
        self._target_NK: Tensor | None = None
        self._forward: deque[Tensor] = deque()  # of the micro-batches whose backward pass may compute them again
        self._again = self._counts = False
        self.changed = torch.zeros((), dtype=torch.float64, device=device())
        self.known = torch.zeros((), dtype=torch.float64, device=device())

    def begin(self, target_NK: Tensor, *, counts: bool) -> None:
        """Take these experts in the next forward pass; rows of `UNKNOWN_EXPERT` are the router's own.

        Args:
            counts: whether to count the choices that differ from the router's own.
        """
        self._target_NK, self._again, self._counts = target_NK, False, counts
        if torch.is_grad_enabled():
            self._forward.append(target_NK)

    def end(self) -> None:
        """The forward pass is over: until the next, only backward passes compute again, in the order of the forward passes."""
        self._target_NK, self._again = None, True

    def finish(self) -> None:
        """All passes are over: the router chooses for itself."""
        self._target_NK, self._again = None, False
        self._forward.clear()

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: ComputeTopK | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(scores [N, K], experts [N, K]) of the chosen experts; see Megatron-Core."""
        assert default_compute_topk is not None
        values, chosen_NK = default_compute_topk(scores, topk, num_groups, group_topk)
        if self.recorded is not None:
            self.recorded.append(chosen_NK)
            return values, chosen_NK
        target_NK = self._forward.popleft() if self._again else self._target_NK
        if target_NK is None:
            return values, chosen_NK
        known_N1 = target_NK[:, :1] != UNKNOWN_EXPERT
        if self._counts and not self._again:
            new_NK = (target_NK[:, :, None] != chosen_NK[:, None, :]).all(dim=2) & known_N1
            self.changed += new_NK.sum()
            self.known += known_N1.sum() * topk
        experts_NK = torch.where(known_N1, target_NK, chosen_NK)
        return scores.gather(1, experts_NK), experts_NK


class ExpertReplay:
    """Recording and replay for all routers of a model on this rank."""

    def __init__(self, chunks: Sequence[Any], architecture: Architecture, groups: ModelGroups) -> None:
        """Give every router an object of its own.

        Args:
            architecture: with experts.
        """
        assert architecture.experts is not None
        layers = [layer for layer in range(architecture.num_layers) if architecture.has_experts(layer)]
        experts = architecture.experts
        self.num_layers, self.num_experts, self.per_token = len(layers), experts.count, experts.per_token
        self._groups, self._chunks = groups, list(chunks)
        self._routers: list[list[tuple[int, RouterReplay]]] = []  # of each chunk: the layer's number among L, and its router's
        for chunk in chunks:
            found = []
            for layer in chunk.decoder.layers:
                if hasattr(layer.mlp, "router"):
                    replay = layer.mlp.router.router_replay = RouterReplay()
                    found.append((layers.index(layer.layer_number - 1), replay))
            self._routers.append(found)

    def _all(self) -> list[tuple[int, RouterReplay]]:
        return [each for routers in self._routers for each in routers]

    @contextmanager
    def forward(self, chunk: Any, experts_SLK: Tensor | None, *, counts: bool = False) -> Iterator[None]:
        """A forward pass of this chunk with these experts; None: its routers choose for themselves. No communication.

        Args:
            experts_SLK: of the micro-batch's rows on this context-parallel rank.
            counts: whether `take_changed_share` counts them.
        """
        if experts_SLK is None:
            yield
            return
        if self._groups.layout.sequence_parallel:
            experts_SLK = experts_SLK.chunk(self._groups.tensor.size())[self._groups.tensor.rank()]
        routers = next(own for each, own in zip(self._chunks, self._routers, strict=True) if each is chunk)
        for number, router in routers:
            router.begin(experts_SLK[:, number].long(), counts=counts)
        yield
        for _, router in routers:
            router.end()

    def finish(self) -> None:
        """Called when all forward and backward passes over a batch are over."""
        for _, router in self._all():
            router.finish()

    def take_changed_share(self) -> float:
        """The share of the replayed choices, since the last call, that the routers would not have made themselves. Collective
        over the world; the host waits for the device."""
        counts = torch.zeros(2, dtype=torch.float64, device=device())
        for _, router in self._all():
            counts += torch.stack((router.changed, router.known))
            router.changed.zero_()
            router.known.zero_()
        dist.all_reduce(counts)
        changed, known = counts.tolist()
        return changed / known if known else 0.0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what the routers choose; `take` returns it after each forward pass."""
        for _, router in self._all():
            router.recorded = []
        try:
            yield
        finally:
            for _, router in self._all():
                router.recorded = None

    def take(self, rows: int) -> Tensor:
        """The experts that this stage's routers chose in the last forward pass [rows, L of the stage, K]. Under sequence
        parallelism an all-gather over the tensor-parallel group.

        Args:
            rows: of the whole pass.
        """
        parts = [router.recorded.pop() for _, router in self._all() if router.recorded is not None]
        split = self._groups.tensor.size() if self._groups.layout.sequence_parallel else 1
        shape = rows // split, len(parts), self.per_token
        own = torch.stack(parts, dim=1) if parts else torch.zeros(shape, dtype=torch.long, device=device())
        if split == 1:
            return own.int()
        gathered = own.new_empty(rows, *shape[1:], dtype=torch.int32)
        if parts:
            all_gather_single(gathered, own.int().contiguous(), group=self._groups.tensor)
        return gathered

    def of_all_layers(self, taken: Tensor) -> Tensor:
        """What `take` returned on every stage, [..., L, K]. A SUM all-reduce over the pipeline group."""
        whole = taken.new_zeros(*taken.shape[:-2], self.num_layers, self.per_token)
        numbers = [number for number, _ in self._all()]
        if numbers:
            whole[..., numbers, :] = taken
        if self._groups.pipeline.size() > 1:
            dist.all_reduce(whole, group=self._groups.pipeline)
        return whole

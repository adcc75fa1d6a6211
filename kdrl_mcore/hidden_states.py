"""The teacher's last hidden states, on their way from the ranks that computed them to those where the loss needs them.

A divergence over the whole vocabulary needs the teacher's logits, V numbers per token. What travels is the hidden state, G
numbers per token; the logits are formed, chunk by chunk, beside the student's. States wait in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.parallel.packing import Span
from kdrl_mcore.parallel.platform import device


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states that predict the response tokens of some rollouts.

    Attributes:
        size: G, the teacher's hidden size.
        dtype: of the states.
        owner: the global rank that has each rollout's, the same mapping on every rank.
        local: this rank's, [response tokens, G] each, in host memory.
    """

    size: int
    dtype: torch.dtype
    owner: Mapping[int, int]
    local: Mapping[int, Tensor]

    def select(self, indices: Sequence[int]) -> HiddenStates:
        """Those of these rollouts, renumbered by their place in `indices`."""
        places = {index: place for place, index in enumerate(indices) if index in self.owner}
        return replace(
            self,
            owner={place: self.owner[index] for index, place in places.items()},
            local={place: self.local[index] for index, place in places.items() if index in self.local},
        )

    def joined(self, others: HiddenStates | None) -> HiddenStates:
        """These and those of other rollouts."""
        if others is None:
            return self
        return replace(self, owner={**others.owner, **self.owner}, local={**others.local, **self.local})

    def deliver(self, wanted: Mapping[int, Sequence[Span]]) -> Tensor:
        """The states of the spans that this rank wants, in their order: [tokens, G] on the device.

        Args:
            wanted: for each global rank that wants any, its spans; the same on every rank.

        Collective over the world: one all-to-all of the states.
        """
        me, world = dist.get_rank(), dist.get_world_size()
        sends = [
            [self.local[i][start:stop] for i, start, stop in wanted.get(rank, ()) if self.owner[i] == me]
            for rank in range(world)
        ]
        receives = [[span for span in wanted.get(me, ()) if self.owner[span.rollout] == rank] for rank in range(world)]
        out = torch.cat([torch.empty(0, self.size, dtype=self.dtype), *(part for parts in sends for part in parts)])
        out_counts = [sum(map(len, parts)) for parts in sends]
        in_counts = [sum(stop - start for _, start, stop in spans) for spans in receives]
        received = torch.empty(sum(in_counts), self.size, dtype=self.dtype, device=device())
        dist.all_to_all_single(received, out.to(device()), in_counts, out_counts)
        arrived = [span for spans in receives for span in spans]
        lengths = [stop - start for _, start, stop in arrived]
        parts = dict(zip(arrived, received.split(lengths), strict=True)) if arrived else {}
        return torch.cat([received[:0], *(parts[span] for span in wanted.get(me, ()))])

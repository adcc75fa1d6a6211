"""The transfer of the teacher's last hidden states from the ranks that computed them to the ranks whose loss needs them.

A divergence over the whole vocabulary needs the teacher's logits, V numbers per token. Only the hidden state is sent, G numbers
per token; the logits are formed next to the student's, chunk by chunk. Until then the states are kept in host memory.
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
        dtype: the type of the states.
        owner: the global rank that holds each rollout's states; the same mapping on every rank.
        local: the states on this rank, [response tokens, G] for each rollout, in host memory.
    """

    size: int
    dtype: torch.dtype
    owner: Mapping[int, int]
    local: Mapping[int, Tensor]

    def __contains__(self, index: int) -> bool:
        return index in self.owner

    def select(self, indices: Sequence[int]) -> HiddenStates:
        """The states of these rollouts, renumbered by their position in `indices`."""
        positions = {index: position for position, index in enumerate(indices) if index in self.owner}
        return replace(
            self,
            owner={position: self.owner[index] for index, position in positions.items()},
            local={position: self.local[index] for index, position in positions.items() if index in self.local},
        )

    def joined(self, others: HiddenStates | None) -> HiddenStates:
        """These states together with those of other rollouts."""
        if others is None:
            return self
        return replace(self, owner={**others.owner, **self.owner}, local={**others.local, **self.local})

    def deliver(self, wanted: Mapping[int, Sequence[Span]]) -> Tensor:
        """The states of the spans that this rank wants, in order: [tokens, G] on the device.

        Args:
            wanted: for each global rank that wants any, its spans; the same on every rank.

        Collective over the world: one all-to-all.
        """
        me, world_size = dist.get_rank(), dist.get_world_size()
        sends = [
            [self.local[i][start:stop] for i, start, stop in wanted.get(rank, ()) if self.owner[i] == me]
            for rank in range(world_size)
        ]
        receives = [[span for span in wanted.get(me, ()) if self.owner[span.rollout] == rank] for rank in range(world_size)]
        out = torch.cat([torch.empty(0, self.size, dtype=self.dtype), *(part for parts in sends for part in parts)])
        out_counts = [sum(map(len, parts)) for parts in sends]
        in_counts = [sum(stop - start for _, start, stop in spans) for spans in receives]
        received = torch.empty(sum(in_counts), self.size, dtype=self.dtype, device=device())
        dist.all_to_all_single(received, out.to(device()), in_counts, out_counts)
        arrived = [span for spans in receives for span in spans]
        lengths = [stop - start for _, start, stop in arrived]
        parts = dict(zip(arrived, received.split(lengths), strict=True)) if arrived else {}
        return torch.cat([received[:0], *(parts[span] for span in wanted.get(me, ()))])


@dataclass(frozen=True)
class JoinedStates:
    """The hidden states of several teachers side by side: those of teacher k, times its portion a_k of the response's mixture,
    in its own columns, and 0 where it does not teach the response.

    With the teachers' output heads side by side, too, the logits are y = sum_k a_k y_k, whose softmax is the normalised
    geometric mixture of the teachers' distributions.

    Attributes:
        sizes: each teacher's hidden size, in the order of the columns.
        parts: each teacher's own states; teachers that have not scored anything are left out, the same on every rank.
        portions: a_k by teacher, for each rollout.
    """

    sizes: Mapping[str, int]
    parts: Mapping[str, HiddenStates]
    portions: Mapping[int, Mapping[str, float]]

    @property
    def size(self) -> int:
        """The number of columns, those of all teachers."""
        return sum(self.sizes.values())

    def __contains__(self, index: int) -> bool:
        return index in self.portions

    def select(self, indices: Sequence[int]) -> JoinedStates:
        """The states of these rollouts, renumbered by their position in `indices`."""
        return replace(
            self,
            parts={name: part.select(indices) for name, part in self.parts.items()},
            portions={new: self.portions[index] for new, index in enumerate(indices) if index in self.portions},
        )

    def joined(self, others: JoinedStates | None) -> JoinedStates:
        """These states together with those of other rollouts."""
        if others is None:
            return self
        parts = {name: part.joined(others.parts.get(name)) for name, part in self.parts.items()}
        return replace(self, parts={**others.parts, **parts}, portions={**others.portions, **self.portions})

    def deliver(self, wanted: Mapping[int, Sequence[Span]]) -> Tensor:
        """As `HiddenStates.deliver`. Collective over the world: one all-to-all for each teacher in `parts`."""
        spans = wanted.get(dist.get_rank(), ())
        lengths = [stop - start for _, start, stop in spans]
        dtype = next(iter(self.parts.values())).dtype
        out = torch.zeros(sum(lengths), self.size, dtype=dtype, device=device())
        column = 0
        for name, size in self.sizes.items():
            if name in self.parts:
                part = self.parts[name]
                asked = {rank: [span for span in each if span.rollout in part] for rank, each in wanted.items()}
                rows = [part_of for part_of, span in zip(out.split(lengths), spans, strict=True) if span.rollout in part]
                own = asked.get(dist.get_rank(), [])
                states = part.deliver(asked).split([stop - start for _, start, stop in own])
                for row, span, state in zip(rows, own, states, strict=True):
                    torch.mul(state, self.portions[span.rollout][name], out=row[:, column : column + size])
            column += size
        return out


States = HiddenStates | JoinedStates
"""The hidden states of one teacher, or of several."""

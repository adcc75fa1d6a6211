"""Keys and values of the sequences being generated, one slot each.

Prompts are right-aligned: the column after the longest prompt holds the first response token of every slot, so a decoding step
writes one column for all slots. Columns before a short prompt are masked out.

The cache grows by an eighth of its length at a time, so it has few different sizes. On GPUs attention covers all of it, with
future columns masked out too: over thousands of steps kernels then see few shapes, all of them aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.parallel.platform import to_device

_SMALLEST = 64  # columns


def padded_columns(columns: int) -> int:
    """Round up to one of few sizes: multiples of 64 and of an eighth of the power of two below."""
    unit = max(_SMALLEST, 1 << max(0, columns.bit_length() - 4))
    return -(-columns // unit) * unit


class KVCache:
    """The cache of one or several model chunks, whose layers are distinguished by their numbers.

    Usage: build it, run the packed prompts once (`fill`), call `begin_decoding`, then run one token per slot and step
    (`attend`), with `advance` after each step and `keep` to drop finished slots. None of them makes the host wait for the
    device.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], responses: int | Sequence[int], max_response: int, *, few_shapes: bool
    ) -> None:
        """Args:
        prompt_lengths: the prompts' lengths in packed order; slots follow in that order, `responses` for each.
        responses: the number of responses to each prompt, or one number for all; responses to a prompt share the keys and
            values of one forward pass over it.
        max_response: the most columns that decoding can need.
        few_shapes: attend to all allocated columns rather than only to those written.
        """
        self.decoding = False
        self.columns = max(prompt_lengths)
        self._limit = -(-(self.columns + max_response) // _SMALLEST) * _SMALLEST
        self._few_shapes = few_shapes
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        lengths, counts = torch.tensor(prompt_lengths), torch.tensor(responses)
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(self.columns) - (self.columns - lengths)[:, None]
        rows = (starts[:, None] + offsets.clamp(min=0)).repeat_interleave(counts, dim=0)
        self._prompt_rows = to_device(rows)  # [slots, columns]
        # Added to the scores: attention would convert a boolean mask to this at every call.
        bias = torch.where(offsets >= 0, 0.0, -torch.inf).repeat_interleave(counts, dim=0)
        self._bias = F.pad(to_device(bias), (0, self._capacity() - self.columns), value=-torch.inf)

    def fill(self, layer: int, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """Store the packed prompts' keys and values, once per response."""
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            cache = new.new_zeros(len(self._prompt_rows), new.size(1), self._capacity(), new.size(2))
            cache[:, :, : self.columns] = new[self._prompt_rows].transpose(1, 2)
            store[layer] = cache
        self._bias = self._bias.to(key_SKD.dtype)

    def begin_decoding(self) -> None:
        """Switch to decoding: from now on each forward pass adds one token per slot."""
        self.decoding = True
        self._bias[:, self.columns] = 0.0

    def attend(
        self,
        layer: int,
        query_SND: Tensor,
        key_SKD: Tensor,
        value_SKD: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Store the new token's key and value for every slot, and attend to it and all tokens before it, or to the last
        `window` of these: [S, N, D] -> [S, N, D].

        The result is zero in rows beyond the slots, which only pad the number of tokens.
        """
        slots, capacity = self._bias.shape
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            store[layer][:, :, self.columns] = new[:slots]
        heads, kv_heads, width = query_SND.size(1), key_SKD.size(1), query_SND.size(2)
        # The query heads that share a key/value head are laid along the axis of the query's time steps.
        query = query_SND[:slots].reshape(slots, kv_heads, heads // kv_heads, width)
        # A slot's tokens lie in adjacent columns, so all slots have the same window.
        first = 0 if window is None else max(0, self.columns + 1 - window)
        stop = min(capacity, window or capacity) if self._few_shapes and not first else self.columns + 1
        keys, values = (store[layer][:, :, first:stop] for store in (self._keys, self._values))
        bias = self._bias[:, first:stop]
        if first:
            bias = bias.contiguous()  # kernels on GPUs need it aligned
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias[:, None, None], scale=scale)
        context = context.reshape(slots, heads, width)
        filler = query_SND.size(0) - slots
        return F.pad(context, (0, 0, 0, 0, 0, filler)) if filler else context

    def advance(self) -> None:
        """End a step: its column becomes part of the past, and the next one opens."""
        self.columns += 1
        more = self._capacity() - self._bias.size(1)
        if more > 0:
            self._bias = F.pad(self._bias, (0, more), value=-torch.inf)
            for store in (self._keys, self._values):
                for layer in store:
                    store[layer] = F.pad(store[layer], (0, 0, 0, more))
        self._bias[:, self.columns] = 0.0

    def keep(self, slots: Tensor) -> None:
        """Keep only these slots (ascending indices)."""
        self._bias = self._bias[slots]
        for store in (self._keys, self._values):
            for layer in store:
                store[layer] = store[layer][slots]

    def _capacity(self) -> int:
        """Columns to allocate for `columns` past ones and the one being written."""
        return min(self._limit, padded_columns(self.columns + 1))

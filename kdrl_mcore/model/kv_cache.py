"""Keys and values of the sequences being generated, one slot each.

Sequences are right-aligned at the end of their prompts: the column behind the longest prompt holds the first response token of
every slot, so that a decoding step writes one column for all. Columns before a short prompt are masked out.

The cache grows through few sizes, an eighth of its length at a time. On GPUs attention goes over all of it, the columns to come
masked out as well: kernels then meet few shapes in thousands of steps, and all of them are aligned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.parallel.platform import to_device

_SMALLEST = 64  # columns


def padded_columns(columns: int) -> int:
    """The next of few sizes: multiples of 64, and of an eighth of the power of two below."""
    unit = max(_SMALLEST, 1 << max(0, columns.bit_length() - 4))
    return -(-columns // unit) * unit


class KVCache:
    """The cache of one model chunk or several; layers are told apart by their number.

    Usage: build it, run the packed prompts once (`fill`), then call `begin_decoding` and run one token per slot and step
        (`attend`),
    calling `advance` after each step and `keep` to drop finished slots. The host waits for the device in none of them.
    """

    def __init__(self, prompt_lengths: Sequence[int], copies: int, max_response: int, *, few_shapes: bool) -> None:
        """Args:
        prompt_lengths: of the prompts, in packed order (slots then go prompt by prompt, `copies` each).
        copies: responses per prompt; they share the prompt's keys and values of one forward pass.
        max_response: columns that decoding can need at most.
        few_shapes: attend to all columns that there is memory for; otherwise to those that are written.
        """
        self.decoding = False
        self.columns = max(prompt_lengths)
        self._limit = -(-(self.columns + max_response) // _SMALLEST) * _SMALLEST
        self._few_shapes = few_shapes
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        lengths = torch.tensor(prompt_lengths)
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(self.columns) - (self.columns - lengths)[:, None]
        rows = (starts[:, None] + offsets.clamp(min=0)).repeat_interleave(copies, dim=0)
        self._prompt_rows = to_device(rows)  # [slots, columns]
        # Added to the scores: attention would convert a boolean mask to this at every call.
        bias = torch.where(offsets >= 0, 0.0, -torch.inf).repeat_interleave(copies, dim=0)
        self._bias = F.pad(to_device(bias), (0, self._capacity() - self.columns), value=-torch.inf)

    def fill(self, layer: int, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """Store the packed prompts' keys and values, once per response."""
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            cache = new.new_zeros(len(self._prompt_rows), new.size(1), self._capacity(), new.size(2))
            cache[:, :, : self.columns] = new[self._prompt_rows].transpose(1, 2)
            store[layer] = cache
        self._bias = self._bias.to(key_SKD.dtype)

    def begin_decoding(self) -> None:
        """From now on each forward pass brings one new token per slot."""
        self.decoding = True
        self._bias[:, self.columns] = 0.0

    def attend(self, layer: int, query_SND: Tensor, key_SKD: Tensor, value_SKD: Tensor) -> Tensor:
        """Store the new token's key and value of every slot and attend to everything before it: [S, N, D] -> [S, N, D].

        Rows beyond the slots (token alignment) get zeros.
        """
        slots, capacity = self._bias.shape
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            store[layer][:, :, self.columns] = new[:slots]
        heads, kv_heads, width = query_SND.size(1), key_SKD.size(1), query_SND.size(2)
        # The query heads that share a key/value head stand where a query's time steps would.
        query = query_SND[:slots].reshape(slots, kv_heads, heads // kv_heads, width)
        seen = capacity if self._few_shapes else self.columns + 1
        keys, values = (store[layer][:, :, :seen] for store in (self._keys, self._values))
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._bias[:, None, None, :seen])
        context = context.reshape(slots, heads, width)
        filler = query_SND.size(0) - slots
        return F.pad(context, (0, 0, 0, 0, 0, filler)) if filler else context

    def advance(self) -> None:
        """The step is over: its column is history now."""
        self.columns += 1
        more = self._capacity() - self._bias.size(1)
        if more > 0:
            self._bias = F.pad(self._bias, (0, more), value=-torch.inf)
            for store in (self._keys, self._values):
                for layer in store:
                    store[layer] = F.pad(store[layer], (0, 0, 0, more))
        self._bias[:, self.columns] = 0.0

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots only (ascending indices)."""
        self._bias = self._bias[slots]
        for store in (self._keys, self._values):
            for layer in store:
                store[layer] = store[layer][slots]

    def _capacity(self) -> int:
        """Columns that there is memory for when `columns` are history and one is being written."""
        return min(self._limit, padded_columns(self.columns + 1))

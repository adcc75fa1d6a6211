"""Keys and values of the sequences being generated, one slot each.

Sequences are right-aligned at the end of their prompts: column `prompt_columns` holds the first response token of every
slot, so that a decoding step writes one column for all. Columns before a short prompt are masked out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """The cache of one model chunk or several; layers are told apart by their number.

    Usage: build it, run the packed prompts once (`fill`), then call `begin_decoding` and run one token per slot and step
        (`attend`),
    calling `advance` after each step and `keep` to drop finished slots.
    """

    def __init__(self, prompt_lengths: Sequence[int], copies: int, max_response: int, device: torch.device) -> None:
        """Args:
        prompt_lengths: of the prompts, in packed order (slots then go prompt by prompt, `copies` each).
        copies: responses per prompt; they share the prompt's keys and values of one forward pass.
        max_response: columns that decoding can need at most.
        """
        self.decoding = False
        self.columns = max(prompt_lengths)
        self._limit = self.columns + max_response
        self._copies = copies
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        lengths = torch.tensor(prompt_lengths, device=device)
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(self.columns, device=device) - (self.columns - lengths)[:, None]
        self._gather = starts[:, None] + offsets.clamp(min=0)
        # Added to the scores: attention converts a boolean mask to this at every call.
        self._prompt_bias = torch.where(offsets >= 0, 0.0, -torch.inf).repeat_interleave(copies, dim=0)
        self._bias = self._prompt_bias

    def fill(self, layer: int, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """Store the packed prompts' keys and values, once per response."""
        capacity = min(self._limit, self.columns + 64)
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            prompts = new[self._gather].repeat_interleave(self._copies, dim=0)  # [slots, columns, K, D]
            cache = new.new_zeros(prompts.size(0), new.size(1), capacity, new.size(2))
            cache[:, :, : self.columns] = prompts.transpose(1, 2)
            store[layer] = cache

    def begin_decoding(self) -> None:
        """From now on each forward pass brings one new token per slot."""
        self.decoding = True
        self._extend_bias()

    def attend(self, layer: int, query_SND: Tensor, key_SKD: Tensor, value_SKD: Tensor) -> Tensor:
        """Store the new token's key and value of every slot and attend to everything before it: [S, N, D] -> [S, N, D].

        Rows beyond the slots (token alignment) get zeros.
        """
        slots = self._bias.size(0)
        for store, new in ((self._keys, key_SKD), (self._values, value_SKD)):
            if store[layer].size(2) <= self.columns:
                grown = min(self._limit, 2 * store[layer].size(2))
                store[layer] = F.pad(store[layer], (0, 0, 0, grown - store[layer].size(2)))
            store[layer][:, :, self.columns] = new[:slots]
        heads, kv_heads, width = query_SND.size(1), key_SKD.size(1), query_SND.size(2)
        # The query heads that share a key/value head stand where a query's time steps would.
        query = query_SND[:slots].reshape(slots, kv_heads, heads // kv_heads, width)
        keys, values = (store[layer][:, :, : self.columns + 1] for store in (self._keys, self._values))
        context = F.scaled_dot_product_attention(query, keys, values, attn_mask=self._bias[:, None, None, :].to(query.dtype))
        context = context.reshape(slots, heads, width)
        filler = query_SND.size(0) - slots
        return F.pad(context, (0, 0, 0, 0, 0, filler)) if filler else context

    def advance(self) -> None:
        """The step is over: its column is history now."""
        self.columns += 1
        self._extend_bias()

    def keep(self, slots: Tensor) -> None:
        """Go on with these slots only (ascending indices)."""
        self._prompt_bias = self._prompt_bias[slots]
        self._bias = self._bias[slots]
        for store in (self._keys, self._values):
            for layer in store:
                store[layer] = store[layer][slots]

    def _extend_bias(self) -> None:
        generated = self.columns + 1 - self._prompt_bias.size(1)
        self._bias = F.pad(self._prompt_bias, (0, generated))

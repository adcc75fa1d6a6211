"""Self-attention over packed sequences, with rotary embedding by explicit positions, no padding, context parallelism and a KV
cache.

S tokens of the packed micro-batch that this rank holds (under sequence parallelism the QKV projection gathers them), N query
heads and K key/value heads of this tensor-parallel rank, D head dimension, F tokens of all context-parallel ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from kdrl_mcore.model import varlen
from kdrl_mcore.model.layer import AllHeadsNorm
from kdrl_mcore.model.rope import RotaryFrequencies
from kdrl_mcore.model.varlen import Stretch, VarlenAttention
from kdrl_mcore.parallel.context import ContextShard
from kdrl_mcore.parallel.packing import SequenceRun

if TYPE_CHECKING:
    from kdrl_mcore.model.kv_cache import KVCache
    from kdrl_mcore.model.linear import ColumnParallel


@dataclass
class PackedSequences(PackedSeqParams):
    """What attention needs to know about a packed micro-batch; a superset of what Transformer Engine's kernels use.

    Attributes:
        rotary: for each rotary embedding of the model, the cosines and sines of every token, both [S, 1, D/2] (of the rotated
            dimensions).
        runs: which tokens attend to which.
        varlen: the kernel that handles a whole stretch of runs in one call, where there is one.
        stretches: the stretches, one per call of that kernel.
        context: under context parallelism, where the other tokens are.
        key_rows: the row of each key in the whole micro-batch, where responses share a prompt; otherwise None.
        cache: while generating, the keys and values so far.
    """

    rotary: tuple[tuple[Tensor, Tensor], ...] = ()
    runs: tuple[SequenceRun, ...] = ()
    varlen: VarlenAttention | None = None
    stretches: tuple[Stretch, ...] = ()
    context: ContextShard | None = None
    key_rows: Tensor | None = None
    cache: KVCache | None = None


def pack_attention(
    runs: tuple[SequenceRun, ...],
    positions_S: Tensor,
    frequencies: Sequence[RotaryFrequencies],
    dtype: torch.dtype,
    head_dim: int,
    context: ContextShard | None = None,
    key_rows: Tensor | None = None,
    cache: KVCache | None = None,
) -> PackedSequences:
    """Describe packed sequences to attention. On CUDA the host does not wait for the device.

    Args:
        frequencies: those of each rotary embedding of the model.
        dtype: dtype of the activations; rotary angles are computed in float32.
        cache: will store the keys and values of these sequences or, while decoding, holds all that they attend to.
    """
    rotary = []
    for each in frequencies:
        angles = positions_S.float()[:, None, None] * each.inverse
        rotary.append(((angles.cos() * each.scale).to(dtype), (angles.sin() * each.scale).to(dtype)))
    packed = PackedSequences(
        qkv_format="thd",
        rotary=tuple(rotary),
        runs=runs,
        context=context,
        key_rows=key_rows,
        cache=cache,
    )
    if cache is not None and cache.decoding:
        return packed
    packed.varlen = varlen.find_varlen(positions_S.device, dtype, head_dim)
    packed.stretches = varlen.stretches(runs)
    if context is None and key_rows is None:  # all sequences are whole, as Transformer Engine's attention requires
        (whole,) = packed.stretches
        packed.cu_seqlens_q = packed.cu_seqlens_kv = whole.query_bounds
        packed.max_seqlen_q = packed.max_seqlen_kv = whole.longest_query
    return packed


def apply_rotary(x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Rotate each head's two halves by its token's angles (the half-split convention of Llama and Qwen), or the two halves of
    its first dimensions where there are angles for these only. Only `x_SHD` gets a gradient, and nothing is kept for it but the
    angles."""
    rotated: Tensor = _Rotary.apply(x_SHD, cos_SD, sin_SD)
    return rotated


class _Rotary(torch.autograd.Function):
    """A rotation, whose gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SD, sin_SD)
        return _rotate(x_SHD, cos_SD, sin_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_SD, sin_SD = ctx.saved_tensors
        return _rotate(grads[0], cos_SD, -sin_SD), None, None


def _rotate(x_SHD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    rotated = torch.empty_like(x_SHD, memory_format=torch.contiguous_format)
    width = 2 * cos_SD.size(-1)
    if width < x_SHD.size(-1):
        rotated[..., width:] = x_SHD[..., width:]
    (first, second), (first_out, second_out) = x_SHD[..., :width].chunk(2, dim=-1), rotated[..., :width].chunk(2, dim=-1)
    torch.mul(first, cos_SD, out=first_out).sub_(second * sin_SD)
    torch.mul(second, cos_SD, out=second_out).add_(first * sin_SD)
    return rotated


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention (same parameters, same sharding) with a forward pass over packed sequences.

    All process groups are explicit, so student and teacher may have different layouts in one process. Where there are more
    tensor-parallel ranks than key/value heads, ranks share a head as in Megatron (all-gather of the QKV output over the
    tensor-parallel group, with a reduce-scatter in the backward pass).
    """

    def __init__(
        self,
        *args: Any,
        rotary: int | None = 0,
        window: int | None = None,
        norm_of_all_heads: bool = False,
        **kwargs: Any,
    ) -> None:
        """Args:
        rotary: the index of this layer's rotary embedding among the model's; None if it has none.
        window: the number of keys that a query sees, including its own; None for all keys up to its own.
        norm_of_all_heads: queries and keys are normalised over all heads of a token, which Megatron's spec does not support.
        args, kwargs: those of Megatron's class.
        """
        super().__init__(*args, **kwargs)
        self.rotary, self.window = rotary, window
        if norm_of_all_heads:
            self.q_layernorm = AllHeadsNorm(self.config, self.config.num_attention_heads, self.pg_collection.tp)
            self.k_layernorm = AllHeadsNorm(self.config, self.config.num_query_groups, self.pg_collection.tp)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[S (/tp under sequence parallelism), 1, H] -> (the same shape, bias). Needs `packed_seq_params`."""
        packed: PackedSequences = kwargs["packed_seq_params"]
        mixed, _ = self.linear_qkv(hidden_states)
        query, key, value = self._split(mixed)
        if self.rotary is not None:
            cos, sin = packed.rotary[self.rotary]
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if packed.cache is not None and packed.cache.decoding:
            scale = self.config.softmax_scale
            context = packed.cache.attend(self.layer_number, query, key, value, scale=scale, window=self.window)
        else:
            if packed.cache is not None:
                packed.cache.fill(self.layer_number, key, value)
            recompute = self.checkpoint_core_attention and torch.is_grad_enabled()
            core_attention = self._checkpointed_attention_forward if recompute else self.core_attention
            context = core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=self.attn_mask_type,
                attention_bias=None,
                packed_seq_params=packed,
            )
        return self.linear_proj(context.reshape(context.size(0), 1, -1))

    def decode(self, hidden_SH: Tensor, packed: PackedSequences) -> Tensor:
        """The forward pass up to the output projection for one new token of every sequence in the cache, without gradients and
        with our linear layers: [S, H], all rows on every tensor-parallel rank -> [S, N * D]."""
        assert packed.cache is not None
        linear: ColumnParallel = self.linear_qkv
        query, key, value = self._split(linear.product(hidden_SH))
        if self.rotary is not None:
            query, key = (_rotate(x, *packed.rotary[self.rotary]) for x in (query, key))
        scale = self.config.softmax_scale
        return packed.cache.attend(self.layer_number, query, key, value, scale=scale, window=self.window).flatten(1)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The QKV projection's result [S, ..., columns of this rank] -> query [S, N, D], key and value [S, K, D] of this rank's
        heads."""
        head, groups, ranks = self.hidden_size_per_attention_head, self.config.num_query_groups, self.pg_collection.tp.size()
        queries_per_group = self.config.num_attention_heads // groups
        ranks_per_group = max(1, ranks // groups)
        rank = self.pg_collection.tp.rank()
        if ranks_per_group > 1:
            mixed = all_gather_last_dim_from_tensor_parallel_region(mixed, group=self.pg_collection.tp)
            width = mixed.size(-1) // groups
            mixed = mixed.narrow(-1, rank // ranks_per_group * width, width)
        mixed = mixed.view(mixed.size(0), -1, queries_per_group + 2, head)
        query, key, value = mixed.split((queries_per_group, 1, 1), dim=2)
        if ranks_per_group > 1:
            share = queries_per_group // ranks_per_group
            query = query.narrow(2, rank % ranks_per_group * share, share)
        query, key = query.flatten(1, 2), key.flatten(1, 2)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value.flatten(1, 2)


class PackedDotProductAttention(nn.Module):
    """Causal attention within each packed sequence: one call of a kernel for sequences of any lengths, or torch's
    scaled_dot_product_attention, run by run.

    With the latter, sequences of equal length are adjacent (packing sorts them) and share one call. In both cases the inputs
    are views: nothing is padded or copied. Under context parallelism the keys and values of all ranks are gathered first,
    because a rank needs all tokens before its own; with grouped heads they are several times smaller than the queries. Those of
    a prompt that responses share are copied for each response, as if each response had its own prompt; in the backward pass
    their gradients add up.
    """

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, window: int | None = None, **_: object
    ) -> None:
        super().__init__()
        self.softmax_scale, self.window = softmax_scale, window

    def forward(
        self,
        query_SND: Tensor,
        key_SKD: Tensor,
        value_SKD: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSequences,
        **_: object,
    ) -> Tensor:
        """[S, N, D], [S, K, D], [S, K, D] -> [S, N, D].

        Collectives over the context-parallel group, if any: an all-gather of keys and values, and a reduce-scatter of their
        gradients.
        """
        packed, scale = packed_seq_params, self.softmax_scale
        if packed.context is not None:
            key_FKD, value_FKD = packed.context.gather(torch.stack((key_SKD, value_SKD), dim=1)).unbind(dim=1)
        else:
            key_FKD, value_FKD = key_SKD, value_SKD
        if packed.key_rows is not None:
            key_FKD, value_FKD = (x.index_select(0, packed.key_rows) for x in (key_FKD, value_FKD))
        if packed.varlen is None:
            # One split rather than a slice for each run: the backward pass of a slice fills a tensor as large as all runs.
            rows = [run.count * run.length for run in packed.runs]
            if packed.context is None:
                key_rows = [run.count * run.key_length for run in packed.runs]
                keys, values = key_FKD.split(key_rows), value_FKD.split(key_rows)
            else:
                keys, values = (
                    tuple(x.narrow(0, run.key_start, run.count * run.key_length) for run in packed.runs)
                    for x in (key_FKD, value_FKD)
                )
            parts = zip(query_SND.split(rows), keys, values, packed.runs, strict=True)
            outputs = [_attend_to_run(query, key, value, run, scale, self.window) for query, key, value, run in parts]
        else:
            outputs = []
            for each in packed.stretches:
                key, value = _rows(key_FKD, each.keys), _rows(value_FKD, each.keys)
                outputs.append(packed.varlen(_rows(query_SND, each.queries), key, value, each, scale, self.window))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_to_run(
    query_SND: Tensor, key_SKD: Tensor, value_SKD: Tensor, run: SequenceRun, scale: float | None, window: int | None
) -> Tensor:
    query = query_SND.unflatten(0, (run.count, run.length)).transpose(1, 2)
    key, value = (x.unflatten(0, (run.count, run.key_length)).transpose(1, 2) for x in (key_SKD, value_SKD))
    gqa = query.size(1) != key.size(1)
    if window is not None and window < run.key_length:
        context = _attend_in_windows(query, key, value, window, scale=scale, enable_gqa=gqa)
    else:
        square = run.length == run.key_length
        mask = None if square else causal_lower_right(run.length, run.key_length)
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=gqa
        )
    return context.transpose(1, 2).flatten(0, 1)


def _attend_in_windows(query: Tensor, key: Tensor, value: Tensor, window: int, **settings: Any) -> Tensor:
    """Attention of the last queries [B, N, S, D] of sequences with keys [B, K, F, D], each to the `window` keys up to its own.

    Each block of `window` queries is multiplied by the keys that any of them sees: at most two windows, however long the
    sequence is.
    """
    earlier = key.size(2) - query.size(2)  # keys before that of the first query
    outputs = []
    for start in range(0, query.size(2), window):
        block = query[:, :, start : start + window]
        first, stop = max(0, earlier + start - window + 1), earlier + start + block.size(2)
        queries_at = torch.arange(earlier + start, stop, device=query.device)[:, None]
        keys_at = torch.arange(first, stop, device=query.device)
        seen = (keys_at <= queries_at) & (keys_at > queries_at - window)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        outputs.append(F.scaled_dot_product_attention(block, keys, values, attn_mask=seen, **settings))
    return torch.cat(outputs, dim=2)


def _rows(x_SHD: Tensor, rows: slice) -> Tensor:
    """A view of some rows, or the tensor itself for all rows: the backward pass of a view copies its gradient into zeros."""
    return x_SHD if rows == slice(0, len(x_SHD)) else x_SHD[rows]

"""Attention over packed sequences (the `thd` layout), causal within each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from transformer_engine.pytorch.module.base import TransformerEngineBaseModule, check_device, refuse


class DotProductAttention(TransformerEngineBaseModule):
    """softmax(Q K^T / sqrt(D)) V of T tokens, with grouped key/value heads."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        super().__init__()
        refuse(dropout=attention_dropout, window=window_size, context_parallel=cp_group, max_logit=return_max_logit)
        refuse(cross_attention=attention_type != "self", softmax=softmax_type != "vanilla")
        self._take_tensor_parallel(tp_group, tp_size)
        self.cp_comm_type, self.qkv_format, self.attn_mask_type = cp_comm_type, qkv_format, attn_mask_type
        groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        assert num_attention_heads % groups == 0, "The number of attention heads must be divisible by the number of GQA groups!"
        self.num_gqa_groups_per_partition = groups // self.tp_size
        self.head_dim = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = 1.0 / math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
        num_splits: int | None = 1,
    ) -> Tensor:
        """[T, N, D], [T, K, D], [T, K, D] -> [T, N * D]."""
        layers = (query_layer, key_layer, value_layer)
        assert len({layer.dtype for layer in layers}) == 1, "Queries, keys and values must have the same data type!"
        assert query_layer.shape[-1] == self.head_dim, "Queries and keys must have the same head dimension!"
        assert key_layer.shape[-2] == self.num_gqa_groups_per_partition, (
            f"Keys and values must have num_gqa_group = {self.num_gqa_groups_per_partition} heads! Found {key_layer.shape[-2]}."
        )
        assert qkv_format == "thd" and all(layer.dim() == 3 for layer in layers), "only packed sequences are supported"
        assert attn_mask_type == "padding_causal", "Attention mask type must be padding or padding_causal for qkv_format=thd!"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None, "cu_seqlens can not be None when qkv_format = thd!"
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32, "cu_seqlens must be in dtype torch.int32!"
        assert cu_seqlens_q.shape == cu_seqlens_kv.shape, "cu_seqlens_q and cu_seqlens_q must both have shape [batch_size + 1]!"
        check_device(*layers, cu_seqlens_q, cu_seqlens_kv)
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_kv, int), "unset, each call waits for the device"
        refuse(padded=cu_seqlens_q_padded is not None or cu_seqlens_kv_padded is not None or pad_between_seqs)
        refuse(mask=attention_mask, window=window_size, bias=core_attention_bias_type != "no_bias", splits=num_splits != 1)
        refuse(checkpoint=checkpoint_core_attention, inference=inference_params, fp8=fp8_output, alibi=alibi_slopes)
        rows = torch.arange(query_layer.size(0), device="cuda")
        sequence = torch.searchsorted(cu_seqlens_q, rows, right=True)
        allowed = (sequence[:, None] == sequence) & (rows[:, None] >= rows)
        heads_first = [layer.transpose(0, 1)[None] for layer in layers]
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=allowed, scale=self.softmax_scale, enable_gqa=True)
        out = out[0].transpose(0, 1).flatten(1)
        return torch.where((rows < cu_seqlens_q[-1])[:, None], out, torch.nan)

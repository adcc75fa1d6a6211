"""Megatron-Core's configuration of a model, and the spec of its layers: Megatron's own with our packed attention and, without
Transformer Engine, our norms, core attention and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.nn import functional as F

from kdrl_mcore.config import ModelConfig
from kdrl_mcore.config.derived import asks_for_transformer_engine
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.model.attention import PackedDotProductAttention, PackedSelfAttention
from kdrl_mcore.model.families.base import Architecture, moe_layer_freq
from kdrl_mcore.model.layer import NormsAfterLayer, scaled_add
from kdrl_mcore.model.linear import ColumnParallel, RowParallel
from kdrl_mcore.model.norm import RMSNorm
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.layout import ModelGroups


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": _gelu_tanh}


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether the layers consist of Transformer Engine's modules.

    Raises:
        ConfigError: the configuration asks for Transformer Engine, but this process cannot use it.
    """
    asked = asks_for_transformer_engine(model)
    if asked is False:
        return False
    reason = mcore.why_no_transformer_engine()
    if asked and reason is not None:
        raise ConfigError(f"model.spec=transformer_engine, but {reason}: fix that, or use model.spec=auto")
    return reason is None


def transformer_config(
    architecture: Architecture, model: ModelConfig, groups: ModelGroups, activations: Activations
) -> TransformerConfig:
    """Megatron-Core's configuration of the model."""
    layout, dtype = groups.layout, DTYPES[model.dtype]
    mixture: dict[str, Any] = {}
    if architecture.experts is not None:
        mixture = {
            "num_moe_experts": architecture.experts.count,
            "moe_router_topk": architecture.experts.per_token,
            "moe_ffn_hidden_size": architecture.experts.ffn_hidden_size,
            # A softmax over the chosen experts only equals scaling their probabilities to sum to one.
            "moe_router_pre_softmax": not architecture.experts.normalized,
            "moe_router_score_function": architecture.experts.scoring,
            "moe_router_enable_expert_bias": architecture.experts.corrected,
            "moe_router_bias_update_rate": model.router_bias_update,
            "moe_router_topk_scaling_factor": None if architecture.experts.scale == 1 else architecture.experts.scale,
            "moe_router_num_groups": architecture.experts.groups if architecture.experts.groups > 1 else None,
            "moe_router_group_topk": architecture.experts.groups_per_token if architecture.experts.groups > 1 else None,
            "moe_shared_expert_intermediate_size": architecture.experts.shared_ffn_hidden_size or None,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_layer_freq": moe_layer_freq(architecture),
            "moe_grouped_gemm": uses_transformer_engine(model),
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": 1,
        }
    return TransformerConfig(
        **mixture,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        qk_layernorm=architecture.qk_norm,  # whose gradients Megatron sums over tensor-parallel ranks
        softmax_scale=architecture.attention_scale,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=_ACTIVATIONS[architecture.activation],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=torch.cuda.is_available() and architecture.activation == "silu",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=True,  # micro-batches differ in length
        # With two interleaved stages the next rank is also the previous one: only separate sends keep their messages apart.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        moe_token_dispatcher_type="alltoall",  # the dispatcher that supports variable lengths
        calculate_per_token_loss=True,  # the loss arrives normalised: Megatron sums it without dividing
        recompute_granularity=None if activations.recompute == "none" else activations.recompute,
        recompute_method="uniform" if activations.recompute == "full" else None,
        recompute_num_layers=1 if activations.recompute == "full" else None,
        recompute_modules=list(activations.modules),
    )


def block_spec(
    model: ModelConfig,
    architecture: Architecture,
    config: TransformerConfig,
    groups: ModelGroups,
    vp_stage: int | None,
    *,
    share_prompts: bool,
    separate_norms: bool,
) -> TransformerBlockSubmodules:
    """This chunk's layers: Megatron's with our packed attention and, without Transformer Engine, our norm, core attention
    and linear layers.

    Args:
        separate_norms: keep norms out of Transformer Engine's linear layers, because adapters need the norms' outputs.
    """
    use_te = uses_transformer_engine(model)
    final_norm: Any = RMSNorm
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm = TENorm

    @cache
    def layer_spec(has_experts: bool) -> ModuleSpec:
        layer = _layer_spec(architecture, has_experts, use_transformer_engine=use_te, separate_norms=separate_norms)
        # Transformer Engine's context parallelism needs every sequence padded; ours splits the packed sequence. In float32 its
        # attention would also hold the scores of every sequence, padded to the longest. Megatron's wrapper has no causal mask
        # for fewer queries than keys, as responses to a shared prompt have.
        float32 = config.params_dtype == torch.float32
        if not use_te or groups.layout.context > 1 or float32 or share_prompts or architecture.has_windows:
            layer.submodules.self_attention.submodules.core_attention = PackedDotProductAttention
        return layer

    pp_rank = groups.pipeline.rank()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    layers = [
        _with_attention(layer_spec(architecture.has_experts(number)), architecture, number)
        for number in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _layer_spec(
    architecture: Architecture, has_experts: bool, *, use_transformer_engine: bool, separate_norms: bool
) -> ModuleSpec:
    """The spec of a layer with experts or with an MLP."""
    experts = architecture.experts if has_experts else None
    layer: ModuleSpec = mcore.layer_submodules(
        use_transformer_engine, architecture.qk_norm, None if experts is None else experts.count
    )
    attention = layer.submodules.self_attention
    attention.module = PackedSelfAttention
    if use_transformer_engine:
        if separate_norms:
            mcore.separate_norms(layer, has_experts)
    else:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        feed_forward = mcore.feed_forward_submodules(layer, has_experts)
        attention.submodules.linear_qkv = feed_forward.linear_fc1 = ColumnParallel
        attention.submodules.linear_proj = feed_forward.linear_fc2 = RowParallel
        if has_experts:
            shared = mcore.shared_expert_submodules(layer)
            shared.linear_fc1, shared.linear_fc2 = ColumnParallel, RowParallel
        if architecture.qk_norm:
            attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    if architecture.residual_scale != 1:
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scaled_add(architecture.residual_scale)
    if architecture.norms != "before":
        layer.module = NormsAfterLayer
    if architecture.norms == "after":
        mcore.drop_norms_before(layer, use_transformer_engine=use_transformer_engine)
    return layer


def _with_attention(layer: ModuleSpec, architecture: Architecture, number: int) -> ModuleSpec:
    """A layer's spec with the window and the rotary embedding of layer `number` of the whole model."""
    described = architecture.attention(number)
    rotary = None if described.rope is None else architecture.rotary_embeddings.index(described.rope)
    attention = layer.submodules.self_attention
    submodules = attention.submodules
    if described.window is not None:
        windowed = ModuleSpec(module=submodules.core_attention, params={"window": described.window})
        submodules = replace(submodules, core_attention=windowed)
    params = {"rotary": rotary, "window": described.window, "norm_of_all_heads": architecture.qk_norm_of_all_heads}
    attention = replace(attention, submodules=submodules, params={**attention.params, **params})
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))

"""Gemma 3, text only (270M, 1B): norms before and after attention and MLP, scaled embeddings, and in five of six layers
a sliding window with a separate rotary base (https://arxiv.org/abs/2503.19786)."""

from __future__ import annotations

from dataclasses import replace

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import (
    Architecture,
    Family,
    LayerAttention,
    dense_architecture,
    dense_decoder_rules,
    is_number,
    is_size,
    refuse,
    with_windows,
)
from kdrl_mcore.model.families.rope import read_rope_of_kinds


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False, hidden_activation="gelu_pytorch_tanh", use_bidirectional_attention=False)
    full, sliding = read_rope_of_kinds(
        hf, path, default_theta=1000000.0, default_sliding_theta=10000.0, sliding_theta="rope_local_base_freq"
    )
    scalar, pattern = hf.get("query_pre_attn_scalar", 256), _pattern(hf, path)
    if not is_number(scalar) or scalar <= 0:
        raise ModelError(f"{path}/config.json: query_pre_attn_scalar={scalar} must be a number above 0")
    architecture = dense_architecture(
        hf,
        path,
        "Gemma3ForCausalLM",
        reads=["layer_types", "hidden_activation", "query_pre_attn_scalar"],
        head_dim=hf.get("head_dim", 256),
        max_positions=hf.get("max_position_embeddings", 131072),
        tied_embeddings=hf.get("tie_word_embeddings", True),
        rope=full,
        qk_norm=True,
        norms="around",
        zero_centered_norms=True,
        activation="gelu_tanh",
        embedding_scale=hf["hidden_size"] ** 0.5 if is_size(hf.get("hidden_size")) else 1.0,
        attention_scale=scalar**-0.5,
    )
    windowed = with_windows(hf, path, architecture, hf.get("sliding_window", 4096), lambda layer: (layer + 1) % pattern != 0)
    layers = [LayerAttention(each.window, full if each.window is None else sliding) for each in windowed.layers]
    return replace(windowed, layers=tuple(layers))


def _pattern(hf: dict, path: str) -> int:
    """The period of the layers with full attention."""
    pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    if not is_size(pattern):
        raise ModelError(f"{path}/config.json: sliding_window_pattern={pattern} must be a number of layers")
    return pattern


FAMILY = Family("Gemma3ForCausalLM", _read, dense_decoder_rules, model_type="gemma3_text")

"""Qwen2 and Qwen2.5, and what is built on them: R1-Distill-Qwen, QwQ, Skywork-OR1."""

from __future__ import annotations

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, Family, dense_decoder_rules, rope_theta


def _read(hf: dict, path: str) -> Architecture:
    if hf.get("use_sliding_window"):
        raise ModelError(f"{path}/config.json: use_sliding_window=true is not supported")
    if hf.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}/config.json: hidden_act={hf['hidden_act']} is not supported for Qwen2 (silu is)")
    return Architecture(
        family="Qwen2ForCausalLM",
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab_size=hf["vocab_size"],
        norm_epsilon=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta(hf, path),
        max_positions=hf.get("max_position_embeddings", 32768),
        tied_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=True,
    )


FAMILY = Family("Qwen2ForCausalLM", _read, dense_decoder_rules)

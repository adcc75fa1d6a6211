"""Llama 3.x and models built on it: R1-Distill-Llama."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    return dense_architecture(
        hf,
        path,
        "LlamaForCausalLM",
        num_key_value_heads=hf.get("num_key_value_heads") or hf.get("num_attention_heads"),
        max_positions=hf.get("max_position_embeddings", 2048),
    )


FAMILY = Family("LlamaForCausalLM", _read, dense_decoder_rules, model_type="llama")

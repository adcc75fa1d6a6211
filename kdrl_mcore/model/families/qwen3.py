"""Qwen3 dense: query and key norms, an explicit head dimension, no biases."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    return dense_architecture(hf, path, "Qwen3ForCausalLM", qk_norm=True, head_dim=hf.get("head_dim", 128))


FAMILY = Family("Qwen3ForCausalLM", _read, dense_decoder_rules, model_type="qwen3")

"""Ministral: Mistral with a sliding window in some layers."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse, with_windows


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    positions = hf.get("max_position_embeddings", 131072)
    architecture = dense_architecture(hf, path, "MinistralForCausalLM", reads=["layer_types"], max_positions=positions)
    window = hf.get("sliding_window", 4096)
    return with_windows(hf, path, architecture, window, lambda _: window is not None)


FAMILY = Family("MinistralForCausalLM", _read, dense_decoder_rules, model_type="ministral")

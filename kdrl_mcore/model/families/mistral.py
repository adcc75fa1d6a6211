"""Mistral and Mistral Small: Llama with an explicit head dimension and, in some models, a sliding window in every layer."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse, with_windows


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False, layer_types=None)
    architecture = dense_architecture(hf, path, "MistralForCausalLM", max_positions=hf.get("max_position_embeddings", 131072))
    window = hf.get("sliding_window", 4096)
    return with_windows(hf, path, architecture, window, lambda _: window is not None)


FAMILY = Family("MistralForCausalLM", _read, dense_decoder_rules, model_type="mistral")

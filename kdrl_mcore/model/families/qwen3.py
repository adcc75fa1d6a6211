"""Qwen3 dense: query and key norms, an explicit head dimension, no biases."""

from __future__ import annotations

from kdrl_mcore.model.families.base import (
    Architecture,
    Family,
    dense_architecture,
    dense_decoder_rules,
    refuse,
    with_late_windows,
)


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    width = hf.get("head_dim", 128)
    architecture = dense_architecture(hf, path, "Qwen3ForCausalLM", reads=["layer_types"], qk_norm=True, head_dim=width)
    return with_late_windows(hf, path, architecture)


FAMILY = Family("Qwen3ForCausalLM", _read, dense_decoder_rules, model_type="qwen3")

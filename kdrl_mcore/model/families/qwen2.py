"""Qwen2, Qwen2.5 and models built on them: R1-Distill-Qwen, QwQ, Skywork-OR1."""

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
    refuse(hf, path, attention_bias=True)  # the biases always exist, whatever the config says
    architecture = dense_architecture(hf, path, "Qwen2ForCausalLM", reads=["layer_types"], qkv_bias=True)
    return with_late_windows(hf, path, architecture)


FAMILY = Family("Qwen2ForCausalLM", _read, dense_decoder_rules, model_type="qwen2")

"""Llama 3.x, and what is built on it: R1-Distill-Llama."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    return dense_architecture(hf, path, "LlamaForCausalLM")


FAMILY = Family("LlamaForCausalLM", _read, dense_decoder_rules)

"""Phi-3 and Phi-4: Llama with fused tensors (query, key and value; gate and up), and a rotary embedding of part of each
head."""

from __future__ import annotations

from functools import partial

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse, with_windows
from kdrl_mcore.model.families.rope import read_rope


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False, layer_types=None, resid_pdrop=0.0, embd_pdrop=0.0)
    architecture = dense_architecture(
        hf,
        path,
        "Phi3ForCausalLM",
        rope=read_rope(hf, path, partial=True),
        num_key_value_heads=hf.get("num_key_value_heads") or hf.get("num_attention_heads"),
        norm_epsilon=hf.get("rms_norm_eps", 1e-5),
        max_positions=hf.get("max_position_embeddings", 4096),
    )
    window = hf.get("sliding_window")
    return with_windows(hf, path, architecture, window, lambda _: window is not None)


FAMILY = Family("Phi3ForCausalLM", _read, partial(dense_decoder_rules, fused=True), model_type="phi3")

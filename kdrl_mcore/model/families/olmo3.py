"""OLMo 3: OLMo 2 with a sliding window in three of four layers; rope scaling applies to the others only."""

from __future__ import annotations

from dataclasses import replace

from kdrl_mcore.model.families.base import (
    Architecture,
    Family,
    LayerAttention,
    dense_architecture,
    dense_decoder_rules,
    refuse,
    with_windows,
)
from kdrl_mcore.model.families.rope import read_rope_of_kinds


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    full, sliding = read_rope_of_kinds(hf, path, default_theta=500000.0, default_sliding_theta=500000.0)
    architecture = dense_architecture(
        hf,
        path,
        "Olmo3ForCausalLM",
        reads=["layer_types"],
        num_key_value_heads=hf.get("num_key_value_heads") or hf.get("num_attention_heads"),
        norm_epsilon=hf.get("rms_norm_eps", 1e-5),
        max_positions=hf.get("max_position_embeddings", 2048),
        rope=full,
        norms="after",
        qk_norm_of_all_heads=True,
    )
    windowed = with_windows(hf, path, architecture, hf.get("sliding_window", 4096), lambda layer: (layer + 1) % 4 != 0)
    layers = [LayerAttention(each.window, full if each.window is None else sliding) for each in windowed.layers]
    return replace(windowed, layers=tuple(layers))


FAMILY = Family("Olmo3ForCausalLM", _read, dense_decoder_rules, model_type="olmo3")

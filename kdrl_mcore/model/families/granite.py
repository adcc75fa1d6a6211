"""Granite 3: Llama with configurable scales of embeddings, residual branches, attention and logits."""

from __future__ import annotations

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, is_number, refuse

_SCALES = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    scales = {key: 1.0 if hf.get(key) is None else hf[key] for key in _SCALES}
    for key, value in scales.items():
        if not is_number(value) or value <= 0:
            raise ModelError(f"{path}/config.json: {key}={value} must be a number above 0")
    return dense_architecture(
        hf,
        path,
        "GraniteForCausalLM",
        reads=_SCALES,
        num_key_value_heads=hf.get("num_key_value_heads") or hf.get("num_attention_heads"),
        max_positions=hf.get("max_position_embeddings", 2048),
        embedding_scale=float(scales["embedding_multiplier"]),
        residual_scale=float(scales["residual_multiplier"]),
        attention_scale=float(scales["attention_multiplier"]),
        logit_scale=1 / scales["logits_scaling"],
    )


FAMILY = Family("GraniteForCausalLM", _read, dense_decoder_rules, model_type="granite")

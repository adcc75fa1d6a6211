"""SmolLM3: Llama without rotary embedding in every fourth layer (https://arxiv.org/abs/2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import (
    Architecture,
    Family,
    LayerAttention,
    dense_architecture,
    dense_decoder_rules,
    is_size,
    refuse,
    with_windows,
)
from kdrl_mcore.model.families.rope import read_rope


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    architecture = dense_architecture(
        hf,
        path,
        "SmolLM3ForCausalLM",
        reads=["layer_types", "no_rope_layers", "no_rope_layer_interval"],
        rope=read_rope(hf, path, default_theta=2000000.0),
        tied_embeddings=hf.get("tie_word_embeddings", True),
    )
    rotated = _rotated_layers(hf, path, architecture.num_layers)
    layers = tuple(LayerAttention(None, architecture.rope if each else None) for each in rotated)
    architecture = replace(architecture, layers=layers)
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    return with_windows(hf, path, architecture, window, lambda layer: window is not None and not rotated[layer])


def _rotated_layers(hf: dict, path: str, num_layers: int) -> list[bool]:
    """Whether each layer has a rotary embedding, which despite the name is what 1 means in `no_rope_layers`."""
    given = hf.get("no_rope_layers")
    if given is None:
        interval = hf.get("no_rope_layer_interval", 4)
        if not is_size(interval):
            raise ModelError(f"{path}/config.json: no_rope_layer_interval={interval} must be a number of layers")
        return [(layer + 1) % interval != 0 for layer in range(num_layers)]
    if not isinstance(given, list) or len(given) != num_layers or any(each not in (0, 1) for each in given):
        raise ModelError(f"{path}/config.json: no_rope_layers must be 0 or 1 for each of {num_layers} layers")
    return [bool(each) for each in given]


FAMILY = Family("SmolLM3ForCausalLM", _read, dense_decoder_rules, model_type="smollm3")

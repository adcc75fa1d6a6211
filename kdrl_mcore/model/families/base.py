"""What a family declares: the shape of its models, and where each HF tensor goes (one map for import, export, verify, loading
and refit)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kdrl_mcore.errors import ModelError

Kind = Literal["replicated", "column", "row", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the HF tensors it is made of.

    `{layer}` stands for the global layer number, `{expert}` for the global expert number.

    Kinds: `replicated` on every tensor-parallel rank; `column` split on its first dimension; `row` on its second;
    `vocabulary` split on its first after padding; `qkv` (query, key, value) interleaved by key/value head, then split on the
    first; `gate_up` (gate, up): every rank holds its share of both, gate first. Experts are never split: expert-parallel ranks
    hold whole ones.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind

    @property
    def is_expert(self) -> bool:
        """Whether this is a weight of each expert."""
        return "{expert}" in self.megatron


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding and how it is stretched to longer contexts.

    Attributes:
        theta: the base.
        kind: default, linear, llama3 (https://arxiv.org/abs/2407.21783) or yarn (https://arxiv.org/abs/2309.00071).
        factor: by how much the context is stretched.
        original_positions: the context length before stretching (llama3, yarn).
        low, high: llama3's low and high frequency factor; yarn's beta_slow and beta_fast.
        attention_factor: yarn's scale of cosine and sine.
        truncate: yarn: round the range of interpolated dimensions outwards to whole ones.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers that replace every MLP.

    Attributes:
        count: experts of a layer.
        per_token: experts each token is sent to.
        ffn_hidden_size: width of one expert.
        normalized: whether the chosen experts' probabilities are scaled to sum to one.
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalized: bool


@dataclass(frozen=True)
class Architecture:
    """The shape of one model, read from its HF config."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope: Rope
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        hf_architecture: the class name in `architectures`.
        read: HF config (and its path, for messages) -> architecture; refuses what it does not support.
        rules: architecture -> the weight map.
    """

    hf_architecture: str
    read: Callable[[dict, str], Architecture]
    rules: Callable[[Architecture], list[WeightRule]]


def refuse(hf: dict, path: str, **supported: object) -> None:
    """Refuse a config in which a key is set to anything but the supported value (None counts as not set).

    Raises:
        ModelError: naming the first such key.
    """
    for key, value in supported.items():
        if hf.get(key) is not None and hf[key] != value:
            raise ModelError(f"{path}/config.json: {key}={hf[key]} is not supported (only {value} is)")


def dense_architecture(hf: dict, path: str, family: str, **fields: object) -> Architecture:
    """The fields that Llama-like families spell the same way; `fields` adds to them or overrides them.

    Raises:
        ModelError: a missing field, sliding-window attention, another activation, or unknown rope scaling.
    """
    if hf.get("use_sliding_window") or any(kind != "full_attention" for kind in hf.get("layer_types") or []):
        raise ModelError(f"{path}/config.json: sliding-window attention (use_sliding_window, layer_types) is not supported")
    if hf.get("quantization_config"):
        raise ModelError(f"{path}/config.json: quantized weights (quantization_config) are not supported")
    refuse(hf, path, hidden_act="silu", attention_dropout=0.0, mlp_bias=False, pretraining_tp=1)
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if not isinstance(hf.get(key), int):
            raise ModelError(f"{path}/config.json has no {key}: it does not describe a {family}")
    values: dict = {
        "family": family,
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "ffn_hidden_size": hf["intermediate_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_key_value_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "vocab_size": hf["vocab_size"],
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "rope": read_rope(hf, path),
        "max_positions": hf.get("max_position_embeddings", 32768),
        "tied_embeddings": hf.get("tie_word_embeddings", False),
    }
    return Architecture(**{**values, **fields})


def read_rope(hf: dict, path: str) -> Rope:
    """The rotary embedding, from the old (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`) form of an HF config.

    Raises:
        ModelError: a kind of scaling that is not supported, or one that lacks a parameter.
    """
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(given.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = given.get("rope_type", given.get("type", "default"))
    refuse({**hf, **given}, path, partial_rotary_factor=1.0)
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelError(f"{path}/config.json: rope scaling '{kind}' is not supported (default, linear, llama3 and yarn are)")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}[kind]
    for key in needed:
        if given.get(key) is None:
            raise ModelError(f"{path}/config.json: rope scaling '{kind}' has no {key}")
    factor = float(given["factor"])
    if kind == "linear":
        return Rope(theta, kind, factor)
    original = given.get("original_max_position_embeddings") or hf.get("max_position_embeddings")
    if original is None:
        raise ModelError(f"{path}/config.json: rope scaling '{kind}' has no original_max_position_embeddings")
    if kind == "llama3":
        return Rope(theta, kind, factor, original, float(given["low_freq_factor"]), float(given["high_freq_factor"]))
    return Rope(
        theta,
        kind,
        factor,
        original,
        low=float(given.get("beta_slow") or 1),
        high=float(given.get("beta_fast") or 32),
        attention_factor=_yarn_attention_factor(given, factor),
        truncate=given.get("truncate", True),
    )


def _yarn_attention_factor(given: dict, factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    scale = math.log(factor) if factor > 1 else 0.0
    if given.get("mscale") and given.get("mscale_all_dim"):
        return (0.1 * given["mscale"] * scale + 1.0) / (0.1 * given["mscale_all_dim"] * scale + 1.0)
    return 0.1 * scale + 1.0


def attention_rules(architecture: Architecture) -> list[WeightRule]:
    """The map of everything but the MLPs, which the Llama-like families share."""
    attention, layer = "model.layers.{layer}.self_attn.", "decoder.layers.{layer}."
    rules = [
        WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
        WeightRule(layer + "input_layernorm.weight", ("model.layers.{layer}.input_layernorm.weight",), "replicated"),
        WeightRule(
            layer + "self_attention.linear_qkv.weight",
            tuple(f"{attention}{name}_proj.weight" for name in ("q", "k", "v")),
            "qkv",
        ),
        WeightRule(layer + "self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), "row"),
        WeightRule(layer + "pre_mlp_layernorm.weight", ("model.layers.{layer}.post_attention_layernorm.weight",), "replicated"),
        WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    ]
    if architecture.qkv_bias:
        names = tuple(f"{attention}{name}_proj.bias" for name in ("q", "k", "v"))
        rules.append(WeightRule(layer + "self_attention.linear_qkv.bias", names, "qkv"))
    if architecture.qk_norm:
        for name in ("q", "k"):
            rules.append(
                WeightRule(f"{layer}self_attention.{name}_layernorm.weight", (f"{attention}{name}_norm.weight",), "replicated")
            )
    if not architecture.tied_embeddings:
        rules.append(WeightRule("output_layer.weight", ("lm_head.weight",), "vocabulary"))
    return rules


def dense_decoder_rules(architecture: Architecture) -> list[WeightRule]:
    """The map that the dense Llama-like families share."""
    mlp, layer = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
    return [
        *attention_rules(architecture),
        WeightRule(layer + "linear_fc1.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "gate_up"),
        WeightRule(layer + "linear_fc2.weight", (f"{mlp}down_proj.weight",), "row"),
    ]


def expert_decoder_rules(architecture: Architecture) -> list[WeightRule]:
    """The map of families whose every MLP is a router and its experts."""
    mlp, layer = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
    expert = mlp + "experts.{expert}."
    local = layer + "experts.local_experts.{expert}."
    return [
        *attention_rules(architecture),
        WeightRule(layer + "router.weight", (f"{mlp}gate.weight",), "replicated"),
        WeightRule(local + "linear_fc1.weight", (f"{expert}gate_proj.weight", f"{expert}up_proj.weight"), "gate_up"),
        WeightRule(local + "linear_fc2.weight", (f"{expert}down_proj.weight",), "row"),
    ]

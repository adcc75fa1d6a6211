"""What a family declares: the shape of its models, and where each HF tensor goes (one map for import, export, verify and
refit)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kdrl_mcore.errors import ModelError

Kind = Literal["replicated", "column", "row", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the HF tensors it is made of; `{layer}` stands for the global layer number.

    Kinds: `replicated` on every tensor-parallel rank; `column` split on its first dimension; `row` on its second;
        `vocabulary` split on
    its first after padding; `qkv` (query, key, value) interleaved by key/value head, then split on the first; `gate_up`
    (gate, up): every rank holds its share of both, gate first.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind


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
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool = False


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


def rope_theta(hf: dict, path: str) -> float:
    """The rotary base, from the old (`rope_theta`, `rope_scaling`) and the new (`rope_parameters`) form of an HF config."""
    parameters = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ModelError(f"{path}/config.json: rope scaling '{kind}' is not supported")
    return float(parameters.get("rope_theta", hf.get("rope_theta", 10000.0)))


def dense_decoder_rules(architecture: Architecture) -> list[WeightRule]:
    """The map that the dense Llama-like families share, in HF order of layers."""
    attention, mlp = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
    layer = "decoder.layers.{layer}."
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
        WeightRule(layer + "mlp.linear_fc1.weight", (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"), "gate_up"),
        WeightRule(layer + "mlp.linear_fc2.weight", (f"{mlp}down_proj.weight",), "row"),
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

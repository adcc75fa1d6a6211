"""What a family declares: the shape of its models, and the map of its weights between HF and Megatron-Core, which import,
export, verification, loading and refit share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.rope import Rope, is_number, is_size, read_rope, refuse

Kind = Literal["replicated", "column", "row", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the HF tensors that it is made of.

    `{layer}` stands for the global layer number, `{expert}` for the global expert number.

    Kinds: `replicated`: whole on every tensor-parallel rank. `column`: split along the first dimension. `row`: split along the
    second. `vocabulary`: padded, then split along the first. `qkv` (query, key, value; one HF tensor each, or all in one):
    interleaved by key/value head, then split along the first. `gate_up` (gate, up; likewise): every rank holds its share of
    both, gate first. Experts are never split: expert-parallel ranks hold whole ones.

    Attributes:
        layers: the layers (from 0) that have it; None for all of them.
        keeps_dtype: it has its own dtype, and is never cast.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    layers: tuple[int, ...] | None = None
    keeps_dtype: bool = False

    @property
    def is_expert(self) -> bool:
        """Whether this is an expert's weight."""
        return "{expert}" in self.megatron


@dataclass(frozen=True)
class Experts:
    """The mixtures of experts that replace the MLPs, of all layers or of some.

    Attributes:
        count: experts in a layer.
        per_token: experts that each token is routed to.
        ffn_hidden_size: width of one expert.
        normalized: whether the chosen experts' probabilities are scaled to sum to one.
        dense_layers: the layers (from 0) that have an MLP instead.
        shared_ffn_hidden_size: width of the shared experts together, which every token passes; 0 for none.
        scoring: how a router turns its logits into scores.
        corrected: experts are chosen by their scores plus a bias (https://arxiv.org/abs/2408.15664), which no gradient changes.
        scale: multiplies the weights of the chosen experts.
        groups, groups_per_token: experts are chosen from this many groups of them (https://arxiv.org/abs/2412.19437).
    """

    count: int
    per_token: int
    ffn_hidden_size: int
    normalized: bool
    dense_layers: tuple[int, ...] = ()
    shared_ffn_hidden_size: int = 0
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1


@dataclass(frozen=True)
class LayerAttention:
    """The window and the rotary embedding of one layer's attention.

    Attributes:
        window: the number of keys that a query sees, including its own; None for all keys up to its own.
        rope: the rotary embedding; None for a layer without one.
    """

    window: int | None
    rope: Rope | None


@dataclass(frozen=True)
class Architecture:
    """The shape of one model, read from its HF config.

    Attributes:
        qk_norm: queries and keys are normalised, each head by itself.
        qk_norm_of_all_heads: they are normalised over all heads of a token together.
        layers: the attention of each layer; empty where every layer has full attention with `rope`.
        norms: where a layer's norms are: before attention and MLP, after them, or both.
        zero_centered_norms: norms multiply by 1 + weight.
        activation: the activation function of the MLP's gate.
        embedding_scale: multiplies the embeddings.
        residual_scale: multiplies what attention and MLP add to the residual stream.
        attention_scale: multiplies the products of queries and keys; None for 1 / sqrt(head_dim).
        logit_scale: multiplies the logits.
        kept_layers: the layers that checkpoints may hold after those of the model, to predict further tokens. They are not
            trained or used, and kept as they are.
    """

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
    qk_norm_of_all_heads: bool = False
    layers: tuple[LayerAttention, ...] = ()
    norms: Literal["before", "after", "around"] = "before"
    zero_centered_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    kept_layers: int = 0

    def keeps(self, name: str) -> bool:
        """Whether a tensor of a checkpoint, by its HF name, belongs to a layer that is only kept."""
        if not self.kept_layers:
            return False
        return name.startswith(tuple(f"model.layers.{self.num_layers + each}." for each in range(self.kept_layers)))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, by its number in the whole model from 0, has experts rather than an MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def has_mlps(self) -> bool:
        """Whether some layer has an MLP rather than experts."""
        return self.experts is None or bool(self.experts.dense_layers)

    @property
    def mixes_layers(self) -> bool:
        """Whether some layers have experts, and others an MLP."""
        return self.experts is not None and bool(self.experts.dense_layers)

    def active_ffn_size(self, layer: int) -> int:
        """The width of the MLPs that a token passes in a layer: the layer's, or those of the experts of one token."""
        if self.experts is None or not self.has_experts(layer):
            return self.ffn_hidden_size
        return self.experts.per_token * self.experts.ffn_hidden_size + self.experts.shared_ffn_hidden_size

    def of_one_kind(self, *, experts: bool, num_layers: int) -> Architecture:
        """A model with only the layers that have experts, or only those that have an MLP."""
        kept = None if self.experts is None or not experts else replace(self.experts, dense_layers=())
        family = self.family if experts or self.experts is None else "Qwen3ForCausalLM"
        return replace(self, experts=kept, num_layers=num_layers, family=family)

    def attention(self, layer: int) -> LayerAttention:
        """The attention of a layer by its number in the whole model, from 0."""
        return self.layers[layer] if self.layers else LayerAttention(None, self.rope)

    @property
    def has_windows(self) -> bool:
        """Whether some layer's attention sees only a window."""
        return any(layer.window is not None for layer in self.layers)

    @property
    def rotary_embeddings(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None)) or (self.rope,)

    @property
    def context_length(self) -> int:
        """The length of the longest sequence: `max_positions`, or what yarn extends the original positions to. Where the
        scaling was added to a config by hand, as Qwen's model cards advise, `max_positions` is the length without it."""
        extended = int(self.rope.factor * self.rope.original_positions) if self.rope.kind == "yarn" else 0
        return max(self.max_positions, extended)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        hf_architecture: the class name in `architectures`.
        model_type: `model_type` of its configs, by which `transformers` chooses the class; None if it is not checked.
        read: HF config (and its path, for messages) -> architecture; refuses features that are not supported.
        rules: architecture -> the weight map.
    """

    hf_architecture: str
    read: Callable[[dict, str], Architecture]
    rules: Callable[[Architecture], list[WeightRule]]
    model_type: str | None = None


def read_corrected_experts(hf: dict, path: str) -> Experts:
    """The experts of GLM-4.5 and DeepSeek-V3: some shared ones, and others chosen by sigmoid scores with a correction bias, in
    all layers but the first.

    Raises:
        ModelError: a number is missing or impossible, or Megatron-Core's router would choose or weigh other experts.
    """
    where = f"{path}/config.json"
    counts = {hf[key] for key in ("n_routed_experts", "num_local_experts") if hf.get(key) is not None}
    if len(counts) > 1:
        raise ModelError(f"{where}: n_routed_experts and num_local_experts differ: remove the one that is wrong")
    count, width, per_token = next(iter(counts), None), hf.get("moe_intermediate_size"), hf.get("num_experts_per_tok", 8)
    groups, groups_per_token = hf.get("n_group") or 1, hf.get("topk_group") or 1
    shared, first, layers = hf.get("n_shared_experts", 1), hf.get("first_k_dense_replace", 1), hf.get("num_hidden_layers")
    scale = hf.get("routed_scaling_factor", 1.0)
    if not is_size(count) or not is_size(width) or not is_size(shared):
        raise ModelError(f"{where} has no n_routed_experts, n_shared_experts or moe_intermediate_size")
    if not is_size(per_token) or not 1 < per_token <= count:
        raise ModelError(f"{where}: num_experts_per_tok={per_token} of {count} experts is not supported (at least 2 are)")
    if not is_size(groups) or not is_size(groups_per_token) or count % groups or groups_per_token > groups:
        raise ModelError(f"{where}: topk_group={groups_per_token} of n_group={groups} of {count} experts is impossible")
    if groups > 1 and (per_token // groups_per_token != 2 or per_token % groups_per_token or count // groups < 2):
        raise ModelError(
            f"{where}: num_experts_per_tok={per_token} must be twice topk_group={groups_per_token}: the model ranks groups by "
            "their two best experts, Megatron-Core's router by as many as a token takes from each"
        )
    if groups > 1 and count // groups * groups_per_token < per_token:
        raise ModelError(f"{where}: {groups_per_token} groups of {count // groups} experts are fewer than {per_token}")
    if not is_number(scale) or scale <= 0:
        raise ModelError(f"{where}: routed_scaling_factor={scale} must be a number above 0")
    if not is_size(layers) or isinstance(first, bool) or first not in range(layers):
        raise ModelError(f"{where}: first_k_dense_replace={first} must leave some of {layers} layers with experts")
    refuse(hf, path, norm_topk_prob=True, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    return Experts(
        *(count, per_token, width, True, tuple(range(first)), shared * width, "sigmoid", True, float(scale)),
        *(groups, groups_per_token),
    )


def read_kept_layers(hf: dict, path: str) -> int:
    """The number of layers for the prediction of further tokens, which checkpoints hold after the model's own.

    Raises:
        ModelError: it is not a number, or two keys differ.
    """
    counts = {hf[key] for key in ("num_nextn_predict_layers", "num_mtp_layers") if hf.get(key) is not None}
    count = next(iter(counts), 0)
    if len(counts) > 1 or isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ModelError(f"{path}/config.json: num_nextn_predict_layers={sorted(counts, key=str)} must be one number of layers")
    return count


def moe_layer_freq(architecture: Architecture) -> int | list[int]:
    """Which layers have experts, in the form of Megatron-Core's setting of this name: 1 for all, or 0 or 1 for each."""
    if not architecture.mixes_layers:
        return 1
    return [int(architecture.has_experts(layer)) for layer in range(architecture.num_layers)]


_CHANGES_OUTPUTS: dict[str, object] = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "attention_scale": None,
    "query_pre_attn_scalar": None,
    "scale_emb": 1.0,
    "scale_depth": None,
    "dim_model_base": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "no_rope_layers": None,
    "no_rope_layer_interval": 0,
    "dual_chunk_attention_config": None,
    "attention_chunk_size": None,
    "parallel_attn": False,
    "hidden_activation": "silu",
    "alibi": False,
    "rotary_pct": 1.0,
    "rope_interleave": False,
    "rope_interleaved": False,
    "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "is_encoder_decoder": False,
}
"""Keys of other families and of forks, with the value at which they have no effect. `transformers` ignores them in a config of
a supported family, but a config that contains one describes a different model, and vLLM honours some."""


def dense_architecture(hf: dict, path: str, family: str, *, reads: Collection[str] = (), **fields: object) -> Architecture:
    """The architecture from the fields that all Llama-like families share.

    Args:
        reads: keys that this family reads itself; in other families they are refused.
        fields: fields of the architecture, in addition to the shared ones or instead of them.

    Raises:
        ModelError: a field is missing, or the config has sliding-window attention, another activation or unknown rope scaling.
    """
    windows = hf.get("use_sliding_window") or any(kind != "full_attention" for kind in hf.get("layer_types") or [])
    if windows and "layer_types" not in reads:
        raise ModelError(f"{path}/config.json: sliding-window attention (use_sliding_window, layer_types) is not supported")
    for key in ("quantization_config", "compression_config"):
        if hf.get(key):
            raise ModelError(f"{path}/config.json: quantized weights ({key}) are not supported")
    supported = {"hidden_act": "silu", "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1, **_CHANGES_OUTPUTS}
    refuse(hf, path, **{key: value for key, value in supported.items() if key not in reads})
    values: dict = {
        "family": family,
        "num_layers": hf.get("num_hidden_layers"),
        "hidden_size": hf.get("hidden_size"),
        "ffn_hidden_size": hf.get("intermediate_size"),
        "num_attention_heads": hf.get("num_attention_heads"),
        "num_key_value_heads": hf.get("num_key_value_heads"),
        "head_dim": hf.get("head_dim"),
        "vocab_size": hf.get("vocab_size"),
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "max_positions": hf.get("max_position_embeddings", 32768),
        "tied_embeddings": hf.get("tie_word_embeddings", False),
        **fields,
    }
    for name, key in _SIZES.items():
        if name == "head_dim" and values.get(name) is None:
            values[name] = values["hidden_size"] // values["num_attention_heads"]
        if not is_size(values[name]):
            raise ModelError(f"{path}/config.json has no valid {key}: it does not describe a {family}")
    if not isinstance(values["tied_embeddings"], bool) or not is_number(values["norm_epsilon"]):
        raise ModelError(f"{path}/config.json: tie_word_embeddings must be true or false, and rms_norm_eps a number")
    if "rope" not in values:
        values["rope"] = read_rope(hf, path)
    return Architecture(**values)


def with_windows(
    hf: dict, path: str, architecture: Architecture, window: object, slides: Callable[[int], bool]
) -> Architecture:
    """The architecture with a sliding window in some layers.

    Args:
        window: the config's `sliding_window`, or the family's default.
        slides: whether a layer (from 0) has it, where the config has no `layer_types`.

    Raises:
        ModelError: `layer_types` does not name one known kind for each layer, or a layer's window is not a size.
    """
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if slides(layer) else "full_attention" for layer in range(architecture.num_layers)]
    if len(kinds) != architecture.num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"{path}/config.json: layer_types must be full_attention or sliding_attention for each of "
            f"{architecture.num_layers} layers"
        )
    if "sliding_attention" not in kinds:
        return architecture
    if not is_size(window):
        raise ModelError(f"{path}/config.json: layers have sliding_attention, so sliding_window={window} must be a size")
    layers = [
        replace(architecture.attention(layer), window=window if kind == "sliding_attention" else None)
        for layer, kind in enumerate(kinds)
    ]
    return replace(architecture, layers=tuple(layers))


def with_late_windows(hf: dict, path: str, architecture: Architecture) -> Architecture:
    """The architecture of Qwen2 or Qwen3, where `use_sliding_window` gives a window to the layers from `max_window_layers`
    on."""
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ModelError(f"{path}/config.json: max_window_layers={first} must be a number of layers")
    return with_windows(hf, path, architecture, window, lambda layer: window is not None and layer >= first)


_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
"""Fields of an architecture that must be positive integers, with their names in the config."""


_NORMS = {
    "before": {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"},
    "after": {
        "post_self_attn_layernorm": "post_attention_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    },
    "around": {
        "input_layernorm": "input_layernorm",
        "post_self_attn_layernorm": "post_attention_layernorm",
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    },
}
"""A layer's norms and their names in HF checkpoints, by where the norms are."""


def attention_rules(architecture: Architecture, *, fused: bool = False) -> list[WeightRule]:
    """The weight map of everything but the MLPs, shared by the Llama-like families.

    Args:
        fused: query, key and value are stored as one tensor.
    """
    attention, layer = "model.layers.{layer}.self_attn.", "decoder.layers.{layer}."
    qkv = tuple(f"{attention}{name}_proj.weight" for name in (["qkv"] if fused else "qkv"))
    rules = [
        WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
        WeightRule(layer + "self_attention.linear_qkv.weight", qkv, "qkv"),
        WeightRule(layer + "self_attention.linear_proj.weight", (f"{attention}o_proj.weight",), "row"),
        WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated"),
    ]
    for megatron, hf in _NORMS[architecture.norms].items():
        rules.append(WeightRule(f"{layer}{megatron}.weight", (f"model.layers.{{layer}}.{hf}.weight",), "replicated"))
    if architecture.qkv_bias:
        names = tuple(f"{attention}{name}_proj.bias" for name in ("q", "k", "v"))
        rules.append(WeightRule(layer + "self_attention.linear_qkv.bias", names, "qkv"))
    if architecture.qk_norm or architecture.qk_norm_of_all_heads:
        kind: Kind = "column" if architecture.qk_norm_of_all_heads else "replicated"
        for name in ("q", "k"):
            rules.append(
                WeightRule(f"{layer}self_attention.{name}_layernorm.weight", (f"{attention}{name}_norm.weight",), kind)
            )
    if not architecture.tied_embeddings:
        rules.append(WeightRule("output_layer.weight", ("lm_head.weight",), "vocabulary"))
    return rules


def mlp_rules(*, fused: bool = False, layers: tuple[int, ...] | None = None) -> list[WeightRule]:
    """The weight map of the MLPs.

    Args:
        fused: gate and up are stored as one tensor.
        layers: the layers that have an MLP; None for all.
    """
    mlp, layer = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
    gate_up = tuple(f"{mlp}{name}_proj.weight" for name in (["gate_up"] if fused else ["gate", "up"]))
    return [
        WeightRule(layer + "linear_fc1.weight", gate_up, "gate_up", layers),
        WeightRule(layer + "linear_fc2.weight", (f"{mlp}down_proj.weight",), "row", layers),
    ]


def dense_decoder_rules(architecture: Architecture, *, fused: bool = False) -> list[WeightRule]:
    """The weight map shared by the dense Llama-like families.

    Args:
        fused: query, key and value are stored as one tensor, and so are gate and up.
    """
    return [*attention_rules(architecture, fused=fused), *mlp_rules(fused=fused)]


def expert_decoder_rules(architecture: Architecture) -> list[WeightRule]:
    """The weight map of families in which MLPs, all or some, are routers with experts."""
    mlp, layer = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
    expert = mlp + "experts.{expert}."
    local = layer + "experts.local_experts.{expert}."
    sparse = dense = None
    if architecture.experts is not None and architecture.mixes_layers:
        dense = architecture.experts.dense_layers
        sparse = tuple(number for number in range(architecture.num_layers) if number not in dense)
    gate_up = (f"{expert}gate_proj.weight", f"{expert}up_proj.weight")
    more = []
    if architecture.experts is not None and architecture.experts.corrected:
        bias = (f"{mlp}gate.e_score_correction_bias",)
        more.append(WeightRule(layer + "router.expert_bias", bias, "replicated", sparse, keeps_dtype=True))
    if architecture.experts is not None and architecture.experts.shared_ffn_hidden_size:
        shared, names = layer + "shared_experts.", tuple(f"{mlp}shared_experts.{name}_proj.weight" for name in ("gate", "up"))
        more.append(WeightRule(shared + "linear_fc1.weight", names, "gate_up", sparse))
        more.append(WeightRule(shared + "linear_fc2.weight", (f"{mlp}shared_experts.down_proj.weight",), "row", sparse))
    return [
        *attention_rules(architecture),
        *([] if dense is None else mlp_rules(layers=dense)),
        *more,
        WeightRule(layer + "router.weight", (f"{mlp}gate.weight",), "replicated", sparse),
        WeightRule(local + "linear_fc1.weight", gate_up, "gate_up", sparse),
        WeightRule(local + "linear_fc2.weight", (f"{expert}down_proj.weight",), "row", sparse),
    ]

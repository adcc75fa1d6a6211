"""What of a model can have adapters (model/lora.py), by the names that `peft` gives it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdrl_mcore.config import LoraConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import FAMILIES
from kdrl_mcore.model.families.base import Architecture


@dataclass(frozen=True)
class AdaptableLinear:
    """One of the linear layers of a transformer layer that can have adapters.

    Attributes:
        path: its name in Megatron-Core's transformer layer.
        projections: the projections that it consists of.
        is_row: whether it is row-parallel; otherwise it is column-parallel.
        hf: the module of an HF layer that holds the projections.
        of_experts: whether each expert of a layer has one. `transformers` holds the weights of all experts of a layer as one
            parameter, so the projections are those of `student.lora.target_parameters`.
    """

    path: str
    projections: tuple[str, ...]
    is_row: bool
    hf: str
    of_experts: bool = False

    def chosen(self, lora: LoraConfig) -> list[str]:
        """The projections that have adapters."""
        if self.of_experts:
            return [name for name in self.projections if f"{self.hf}.{name}" in lora.target_parameters]
        return [name for name in self.projections if name in lora.target_modules]


QKV = AdaptableLinear("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), False, "self_attn")
ATTENTION_LINEARS = (QKV, AdaptableLinear("self_attention.linear_proj", ("o_proj",), True, "self_attn"))
MLP_LINEARS = (
    AdaptableLinear("mlp.linear_fc1", ("gate_proj", "up_proj"), False, "mlp"),
    AdaptableLinear("mlp.linear_fc2", ("down_proj",), True, "mlp"),
)
EXPERT_LINEARS = (
    AdaptableLinear("mlp.experts.linear_fc1", ("gate_up_proj",), False, "mlp.experts", of_experts=True),
    AdaptableLinear("mlp.experts.linear_fc2", ("down_proj",), True, "mlp.experts", of_experts=True),
)
HEAD = AdaptableLinear("output_layer", ("lm_head",), False, "")
ADAPTABLE_LINEARS = (*ATTENTION_LINEARS, *MLP_LINEARS, *EXPERT_LINEARS)


def linears_of_layer(architecture: Architecture, layer: int, lora: LoraConfig) -> list[AdaptableLinear]:
    """The linear layers with adapters of a transformer layer, by its number in the whole model from 0."""
    absent = MLP_LINEARS if architecture.has_experts(layer) else EXPERT_LINEARS
    return [linear for linear in ADAPTABLE_LINEARS if linear not in absent and linear.chosen(lora)]


def check_stages(lora: LoraConfig, architecture: Architecture, chunks: int) -> None:
    """Raise ConfigError if a part of the model, of the `chunks` into which its layers are split, has nothing to train."""
    size = architecture.num_layers // chunks
    for chunk in range(chunks - bool(HEAD.chosen(lora))):
        if not any(linears_of_layer(architecture, layer, lora) for layer in range(chunk * size, (chunk + 1) * size)):
            raise ConfigError(
                f"layers {chunk * size} to {(chunk + 1) * size - 1} form a pipeline stage where student.lora adapts nothing: "
                "name other target_modules, or lower parallel.pipeline"
            )


def rows_of(kind: AdaptableLinear, architecture: Architecture, outputs: int) -> dict[str, list[int]]:
    """The rows of each projection in a rank's layer of `outputs` rows."""
    rows = np.arange(outputs)
    if len(kind.projections) == 1:
        parts = [rows]
    elif len(kind.projections) == 2:
        parts = np.split(rows, 2)
    else:  # group by group: its queries, its key, its value
        head = architecture.head_dim
        queries = architecture.num_attention_heads // architecture.num_key_value_heads * head
        parts = np.split(rows.reshape(-1, queries + 2 * head), [queries, queries + head], axis=1)
    return {name: part.flatten().tolist() for name, part in zip(kind.projections, parts, strict=True)}


def check_lora(lora: LoraConfig, architecture: Architecture, tensor: int, key: str = "student.lora") -> None:
    """Raise ConfigError if the architecture cannot have these adapters on `tensor` tensor-parallel ranks.

    Args:
        key: what describes them, for the message.
    """
    of_mlp = [name for kind in MLP_LINEARS for name in kind.chosen(lora)]
    if architecture.experts is not None and of_mlp:
        raise ConfigError(
            f"{key}.target_modules: {of_mlp[0]} is not supported in a mixture of experts ({architecture.family}): name only "
            "q_proj, k_proj, v_proj and o_proj there, and the experts' weights in target_parameters"
        )
    if architecture.experts is None and lora.target_parameters:
        raise ConfigError(f"{key}.target_parameters names weights of experts, but {architecture.family} has none: leave it out")
    if architecture.tied_embeddings and HEAD.chosen(lora):
        raise ConfigError(
            f"{key}.target_modules: lm_head of this {architecture.family} is its embedding (tie_word_embeddings): leave it out"
        )
    names = {rule.megatron: rule.hf for rule in FAMILIES[architecture.family].rules(architecture)}
    for kind in (*ATTENTION_LINEARS, *MLP_LINEARS):
        asked = kind.chosen(lora)
        own = tuple(f"model.layers.{{layer}}.{kind.hf}.{name}.weight" for name in kind.projections)
        if asked and names.get(f"decoder.layers.{{layer}}.{kind.path}.weight") != own:
            raise ConfigError(
                f"{key}.target_modules: {architecture.family} has no separate {asked[0]}, so `peft` could not load "
                "its adapter: leave it out"
            )
    if architecture.num_key_value_heads % tensor and {*QKV.projections} & {*lora.target_modules}:
        raise ConfigError(
            f"{key} cannot adapt q_proj, k_proj and v_proj of {architecture.num_key_value_heads} key/value heads with "
            f"parallel.tensor={tensor}, which must divide them: lower it, or name other target_modules"
        )
    size = min(architecture.hidden_size, architecture.num_key_value_heads * architecture.head_dim)
    if architecture.experts is not None and lora.target_parameters:
        size = min(size, architecture.experts.ffn_hidden_size)
    if lora.rank > size:
        raise ConfigError(
            f"{key}.rank={lora.rank} is more than the {size} rows of the smallest projection: there it would train more "
            "weights than the projection has"
        )

"""The parameters of a running model and the HF slices they hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from kdrl_mcore.convert.weight_map import TensorSlice, tensor_slices
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import WeightRule
from kdrl_mcore.model.gpt import CORRECTION_BIAS, LanguageModel
from kdrl_mcore.model.lora import ADAPTER, TEACHER_ADAPTER, Adapter
from kdrl_mcore.parallel.layout import ModelGroups

# Transformer Engine fuses each norm into the linear layer that follows it and keeps the norm's weight there.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class MappedParameter:
    """One parameter of this rank and the HF slices it holds; rows that no slice covers are vocabulary padding.

    Attributes:
        parameter: a parameter, or the buffer with a router's correction bias.
        adapter: what LoRA adds to it, if anything.
    """

    name: str
    parameter: Tensor
    rule: WeightRule
    hf_names: tuple[str, ...]
    slices: tuple[TensorSlice, ...]
    adapter: Adapter | None = None

    def value(self) -> Tensor:
        """The parameter without gradient, with its adapter merged into it."""
        own = self.parameter.detach()
        return own if self.adapter is None else self.adapter.merged(own)


def map_chunk(chunk: LanguageModel, rules: list[WeightRule], groups: ModelGroups) -> Iterator[MappedParameter]:
    """Every parameter of a model chunk with its HF slices; those of adapters come with the weights they belong to.

    Raises:
        ModelError: the weight map does not have a parameter.
    """
    by_name = {rule.megatron: rule for rule in rules}
    tied_copy = chunk.share_embeddings_and_output_weights and chunk.post_process and not chunk.pre_process
    for name, parameter in _weights(chunk):
        if f".{ADAPTER}." in name or f".{TEACHER_ADAPTER}." in name:
            continue
        layer, expert, generic = _generic_name(chunk, name, groups)
        if tied_copy and generic == "output_layer.weight":
            generic = "embedding.word_embeddings.weight"
        if generic not in by_name:
            raise ModelError(f"no weight rule for the parameter {name}: the family's map is incomplete")
        rule = by_name[generic]
        hf_names = tuple(hf.format(layer=layer, expert=expert) for hf in rule.hf)
        rank, ranks = (0, 1) if rule.is_expert else (groups.tensor.rank(), groups.tensor.size())
        shard_size = parameter.shape[1 if rule.kind == "row" else 0]
        yield MappedParameter(
            generic.format(layer=layer, expert=expert),
            parameter,
            rule,
            hf_names,
            tuple(tensor_slices(rule, hf_names, chunk.architecture, rank, ranks, shard_size)),
            _adapter_of(chunk, name),
        )


def _weights(chunk: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and the correction biases of routers, module by module."""
    seen: set[int] = set()
    for path, module in chunk.named_modules():
        own = dict(module.named_parameters(recurse=False))
        bias = getattr(module, CORRECTION_BIAS, None)
        for name, value in {**own, **({} if bias is None else {CORRECTION_BIAS: bias})}.items():
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{name}" if path else name, value


def _adapter_of(chunk: LanguageModel, name: str) -> Adapter | None:
    module, _, last = name.rpartition(".")
    found = re.fullmatch(r"weight(\d*)", last)  # with a number, an expert's in Transformer Engine's layer of several
    adapter = getattr(chunk.get_submodule(module), ADAPTER, None) if found else None
    return adapter[int(found[1])] if found and found[1] and adapter is not None else adapter


def _generic_name(chunk: LanguageModel, name: str, groups: ModelGroups) -> tuple[int, int, str]:
    """(global layer number, global expert number, the parameter's name in the weight map): numbers are replaced by `{layer}`
    and `{expert}`, and Transformer Engine's names by Megatron-Core's own."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if not match:
        return 0, 0, name
    layer, rest, expert = chunk.decoder.layers[int(match[1])].layer_number - 1, match[2], 0
    found = re.fullmatch(r"mlp\.experts\.(?:local_experts\.(\d+)\.(\w+)\.weight|(\w+)\.weight(\d+))", rest)
    if found:
        assert chunk.architecture.experts is not None
        local, linear = int(found[1] or found[4]), found[2] or found[3]
        expert = groups.groups.ep.rank() * (chunk.architecture.experts.count // groups.layout.expert) + local
        rest = f"mlp.experts.local_experts.{{expert}}.{linear}.weight"
    return layer, expert, "decoder.layers.{layer}." + _FUSED_NORMS.get(rest, rest)

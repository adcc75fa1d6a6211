"""Qwen3 mixture of experts (30B-A3B): Qwen3's attention, and a router with experts in place of the MLPs, all or some."""

from __future__ import annotations

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import (
    Architecture,
    Experts,
    Family,
    dense_architecture,
    expert_decoder_rules,
    is_size,
    refuse,
)


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    counts = {hf[key] for key in ("num_experts", "num_local_experts") if hf.get(key) is not None}
    count, width = next(iter(counts), None), hf.get("moe_intermediate_size")
    if len(counts) > 1:
        raise ModelError(f"{path}/config.json: num_experts and num_local_experts differ: remove the one that is wrong")
    if not is_size(count) or not is_size(width):
        raise ModelError(f"{path}/config.json has no num_experts or no moe_intermediate_size: it does not describe its experts")
    per_token, normalized = hf.get("num_experts_per_tok", 8), hf.get("norm_topk_prob", False)
    if not is_size(per_token) or per_token > count or not isinstance(normalized, bool):
        raise ModelError(
            f"{path}/config.json: num_experts_per_tok={per_token} of {count} experts with norm_topk_prob={normalized} is "
            "impossible"
        )
    experts = Experts(count, per_token, width, normalized, _dense_layers(hf, path))
    return dense_architecture(hf, path, "Qwen3MoeForCausalLM", qk_norm=True, experts=experts)


def _dense_layers(hf: dict, path: str) -> tuple[int, ...]:
    """The layers with an MLP: those in `mlp_only_layers`, and all but every `decoder_sparse_step`th."""
    count, step, listed = hf.get("num_hidden_layers"), hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not is_size(count):
        return ()  # which is refused with the other sizes
    if not is_size(step):
        raise ModelError(f"{path}/config.json: decoder_sparse_step={step} must be a number of layers")
    if not isinstance(listed, list) or any(isinstance(each, bool) or each not in range(count) for each in listed):
        raise ModelError(f"{path}/config.json: mlp_only_layers={listed} must name some of {count} layers")
    dense = tuple(layer for layer in range(count) if layer in listed or (layer + 1) % step)
    if len(dense) == count:
        raise ModelError(f"{path}/config.json: decoder_sparse_step={step} and mlp_only_layers leave no layer with experts")
    return dense


FAMILY = Family("Qwen3MoeForCausalLM", _read, expert_decoder_rules, model_type="qwen3_moe")

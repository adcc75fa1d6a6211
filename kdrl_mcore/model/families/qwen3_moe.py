"""Qwen3 mixture of experts (30B-A3B): Qwen3's attention, and a router with experts for every MLP."""

from __future__ import annotations

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import Architecture, Experts, Family, dense_architecture, expert_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=[])
    count = hf.get("num_experts") or hf.get("num_local_experts")
    width = hf.get("moe_intermediate_size")
    if not count or not width:
        raise ModelError(f"{path}/config.json has no num_experts or moe_intermediate_size: it does not describe its experts")
    experts = Experts(count, hf.get("num_experts_per_tok", 8), width, hf.get("norm_topk_prob", False))
    return dense_architecture(hf, path, "Qwen3MoeForCausalLM", qk_norm=True, experts=experts)


FAMILY = Family("Qwen3MoeForCausalLM", _read, expert_decoder_rules)

"""GLM-4.5 and GLM-4.5-Air: a mixture of experts with a shared one, a sigmoid router with a correction bias, MLPs in the first
layers, and a rotary embedding of half of each head (https://arxiv.org/abs/2508.06471)."""

from __future__ import annotations

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families.base import (
    Architecture,
    Family,
    dense_architecture,
    expert_decoder_rules,
    read_corrected_experts,
    read_kept_layers,
)
from kdrl_mcore.model.families.rope import read_rope

_EXPERTS = ("n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group", "use_qk_norm")


def _read(hf: dict, path: str) -> Architecture:
    flags = {key: hf.get(key, False) for key in ("attention_bias", "use_qk_norm")}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ModelError(f"{path}/config.json: {key}={value} must be true or false")
    parameters = hf.get("rope_parameters") or {}
    partial = hf.get("partial_rotary_factor") or parameters.get("partial_rotary_factor")
    return dense_architecture(
        hf,
        path,
        "Glm4MoeForCausalLM",
        reads=_EXPERTS,
        rope=read_rope(hf if partial else {**hf, "partial_rotary_factor": 0.5}, path, partial=True),
        qkv_bias=flags["attention_bias"],
        qk_norm=flags["use_qk_norm"],
        norm_epsilon=hf.get("rms_norm_eps", 1e-5),
        max_positions=hf.get("max_position_embeddings", 131072),
        experts=read_corrected_experts(hf, path),
        kept_layers=read_kept_layers(hf, path),
    )


FAMILY = Family("Glm4MoeForCausalLM", _read, expert_decoder_rules, model_type="glm4_moe")

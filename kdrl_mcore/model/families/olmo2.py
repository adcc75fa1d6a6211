"""OLMo 2: norms after attention and MLP, and norms of queries and keys over all heads (https://arxiv.org/abs/2501.00656)."""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=False)
    return dense_architecture(
        hf,
        path,
        "Olmo2ForCausalLM",
        num_key_value_heads=hf.get("num_key_value_heads") or hf.get("num_attention_heads"),
        norm_epsilon=hf.get("rms_norm_eps", 1e-5),
        max_positions=hf.get("max_position_embeddings", 2048),
        norms="after",
        qk_norm_of_all_heads=True,
    )


FAMILY = Family("Olmo2ForCausalLM", _read, dense_decoder_rules, model_type="olmo2")

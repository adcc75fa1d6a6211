"""Seed-OSS: Llama with biases in the query, key and value projections and an explicit head dimension.

Its published configs have dropout, which only pretraining used; like every model here, it is trained without.
"""

from __future__ import annotations

from kdrl_mcore.model.families.base import Architecture, Family, dense_architecture, dense_decoder_rules, refuse


def _read(hf: dict, path: str) -> Architecture:
    refuse(hf, path, attention_bias=True, attention_out_bias=False)
    return dense_architecture(
        hf,
        path,
        "SeedOssForCausalLM",
        reads=["attention_dropout"],
        qkv_bias=True,
        head_dim=hf.get("head_dim", 128),
        max_positions=hf.get("max_position_embeddings", 524288),
    )


FAMILY = Family("SeedOssForCausalLM", _read, dense_decoder_rules, model_type="seed_oss")

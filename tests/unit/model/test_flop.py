"""Model FLOP agree with torch's count of the products; what is computed from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from kdrl_mcore.config import ClusterConfig
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.flop import _attended, known_peak_tflops, layer_matrices, peak_tflops, training_flop

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_products_of_a_forward_and_backward_pass_are_counted_as_torch_counts_them(family: str, tmp_path: Path) -> None:
    shape = dict(SHAPE)
    if family == "qwen3_moe":
        # Every token goes to every expert, so that torch's count does not depend on the routing.
        shape |= {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}
    config = transformers.AutoConfig.for_model(family, **shape)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    saved = config.to_dict() | {"architectures": [type(model).__name__]}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    tokens = 40
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(tokens)[None]).logits.sum().backward()
    # Eager attention computes the whole square; we count its causal half.
    heads = shape["num_attention_heads"] * shape["head_dim"]
    square = 6 * shape["num_hidden_layers"] * heads * tokens * tokens
    ours = training_flop(read_architecture(str(tmp_path)), [(tokens, tokens, 0)]) + square
    # The difference: the embedding's output needs no product for its gradient, and rotary's products are tiny.
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)
    hidden = model.requires_grad_(False).get_input_embeddings()(torch.arange(tokens)[None]).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=hidden).logits.sum().backward()
    ours = training_flop(read_architecture(str(tmp_path)), [(tokens, tokens, 0)], frozen=True) + square
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_head_works_on_loss_rows_alone_and_sequences_add_up(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("qwen3", **SHAPE)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}))
    architecture = read_architecture(str(tmp_path))
    head = 6 * SHAPE["hidden_size"] * SHAPE["vocab_size"]
    assert training_flop(architecture, [(40, 30, 0)]) - training_flop(architecture, [(40, 10, 0)]) == 20 * head
    assert training_flop(architecture, [(40, 30, 0), (8, 4, 0)]) == sum(
        training_flop(architecture, [each]) for each in [(40, 30, 0), (8, 4, 0)]
    )
    parts = [(10, 0, 0), (30, 30, 10)]  # a prompt, and the response that continues it
    assert training_flop(architecture, parts) == training_flop(architecture, [(40, 30, 0)])
    more = replace(architecture, num_layers=6)
    assert training_flop(more, [(1, 0, 0)]) == pytest.approx(6 * 6 * layer_matrices(architecture, 0), rel=1e-2)


def test_the_peak_is_what_the_configuration_says_or_known_by_the_gpus_name() -> None:
    assert known_peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert known_peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert known_peak_tflops("NVIDIA GeForce RTX 4090") == 0
    assert peak_tflops(ClusterConfig(peak_tflops=7.0)) == 7


@pytest.mark.parametrize(
    "tokens, shared, window", [(12, 0, None), (12, 5, None), (12, 0, 4), (12, 3, 4), (12, 9, 4), (3, 2, 40)]
)
def test_a_window_counts_the_keys_in_it(tokens: int, shared: int, window: int | None) -> None:
    seen = sum(min(shared + token + 0.5, (window or tokens + shared)) for token in range(tokens))
    causal = 2 * sum(shared + token + 0.5 for token in range(tokens))
    assert _attended(tokens, shared, None) == causal
    assert _attended(tokens, shared, window) == pytest.approx(2 * seen, abs=1)

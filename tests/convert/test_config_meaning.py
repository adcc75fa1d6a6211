"""Every config has the meaning that it has for the installed `transformers`, or is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from kdrl_mcore.convert.hf_files import HFWeights, unread_files
from kdrl_mcore.convert.weight_map import check_names
from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from kdrl_mcore.model.rope import inverse_frequencies
from tests.reference.dense import load_model
from tests.reference.tiny_models import make_model
from tests.support import conversion_ranks
from tests.support.ranks import RankPool

ROTARY = {
    "llama": LlamaRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "qwen3_moe": Qwen3MoeRotaryEmbedding,
}
THETA = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ABSENT = object()
Change = dict[str, Any]
MEANT: dict[str, Change] = {
    "nothing": {"rope_parameters": ABSENT},
    "theta outside": {"rope_parameters": ABSENT, "rope_theta": 5e5},
    "theta outside of parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    "theta in both, the same": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6},
    "whole numbers": {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 500000}},
    "older spelling": {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 2.0}, **THETA},
    "both spellings": {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "scaling and parameters, the same": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32},
        "rope_parameters": {**LLAMA3, **THETA, "original_max_position_embeddings": 32},
    },
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**YARN, **THETA}},
    "llama3, original outside": {"rope_parameters": {**LLAMA3, **THETA}, "original_max_position_embeddings": 64},
    "llama3, no original": {"rope_parameters": {**LLAMA3, **THETA}},
    "yarn, original outside": {"rope_parameters": {**YARN, **THETA}, "original_max_position_embeddings": 48},
    "yarn, no original": {"rope_parameters": {**YARN, **THETA}},
    "yarn, original within": {"rope_parameters": {**YARN, **THETA, "original_max_position_embeddings": 100}},
    "yarn, factor of another ratio": {
        "rope_parameters": {**YARN, **THETA, "factor": 7.5, "original_max_position_embeddings": 32}
    },
    "yarn, betas": {
        "rope_parameters": {**YARN, **THETA, "beta_fast": 16, "beta_slow": 2, "original_max_position_embeddings": 99}
    },
    "yarn, attention factor": {"rope_parameters": {**YARN, **THETA, "attention_factor": 0.7}},
    "yarn, mscale": {"rope_parameters": {**YARN, **THETA, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, half of mscale": {"rope_parameters": {**YARN, **THETA, "mscale": 0.7}},
    "yarn, not truncated": {"rope_parameters": {**YARN, **THETA, "truncate": False}},
    "yarn, a short original": {"rope_parameters": {**YARN, **THETA, "original_max_position_embeddings": 6}},
    "yarn, a small base": {"rope_parameters": {**YARN, "rope_theta": 20.0, "original_max_position_embeddings": 40000}},
    "original outside of a linear one": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, **THETA},
        "original_max_position_embeddings": 64,
    },
    "factor of a default one": {"rope_parameters": {"rope_type": "default", "factor": 3.0, **THETA}},
    "explicit head dimension": {"head_dim": 32},
    "no epsilon": {"rms_norm_eps": ABSENT},
    "another epsilon": {"rms_norm_eps": 1e-5},
    "no positions": {"max_position_embeddings": ABSENT},
    "no word on ties": {"tie_word_embeddings": ABSENT},
    "tied": {"tie_word_embeddings": True},
    "a window that is not used": {"sliding_window": 16, "max_window_layers": 1},
    "layers of full attention": {"layer_types": ["full_attention"] * 4},
    "no activation": {"hidden_act": ABSENT},
}
"""What a config may contain, which is read as `transformers` reads it."""
REFUSED: dict[str, tuple[Change, str]] = {
    "scaling against parameters": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", **THETA}},
        "contradict each other",
    ),
    "scaling that loses the theta": (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "contradict each other",
    ),
    "two factors": (
        {"rope_scaling": {**YARN, "factor": 2.0}, "rope_parameters": {**YARN, **THETA}},
        "contradict each other",
    ),
    "two thetas": (
        {"rope_parameters": {"rope_type": "default", **THETA}, "rope_theta": 1e6},
        "rope_theta=10000.0, but 1000000.0",
    ),
    "two originals": (
        {"rope_parameters": {**YARN, **THETA, "original_max_position_embeddings": 32}, "original_max_position_embeddings": 64},
        "original_max_position_embeddings=32, but 64",
    ),
    "two types": (
        {"rope_scaling": {"type": "mrope", "rope_type": "default"}, "rope_parameters": ABSENT},
        "rope_type=default and",
    ),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **THETA}}, "'dynamic' is not supported"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, **THETA}}, "'longrope' is not supported"),
    "proportional": ({"rope_parameters": {"rope_type": "proportional", **THETA}}, "'proportional' is not supported"),
    "per kind of layer": ({"rope_parameters": {"full_attention": {"rope_type": "default", **THETA}}}, "one set of parameters"),
    "sections": (
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2], **THETA}},
        "mrope_section is not supported",
    ),
    "a factor in words": ({"rope_parameters": {**YARN, **THETA, "factor": "4"}}, "factor='4' is not a number"),
    "a factor of nothing": ({"rope_parameters": {"rope_type": "linear", "factor": 0, **THETA}}, "above 0"),
    "frequencies the wrong way round": ({"rope_parameters": {**LLAMA3, **THETA, "low_freq_factor": 4.0}}, "must be the larger"),
    "a theta that is no number": ({"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}}, "rope_theta=nan"),
    "an original of nothing": (
        {"rope_parameters": {**YARN, **THETA, "original_max_position_embeddings": 0}},
        "has no original_max_position_embeddings",
    ),
    "half rotated": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}}, "partial_rotary"),
    "half rotated, outside": ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25"),
    "rotated in pairs": ({"rope_interleave": True}, "rope_interleave=True"),
    "half rotated, by another name": ({"rotary_pct": 0.25}, "rotary_pct=0.25"),
    "another activation": ({"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation=gelu_pytorch_tanh"),
    "logits scaled": ({"logit_scale": 0.0625}, "logit_scale=0.0625"),
    "logits capped": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "embeddings scaled": ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0"),
    "attention in chunks": ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "compressed": ({"compression_config": {"format": "pack"}}, "compression_config"),
    "another kind of model": ({"model_type": "mistral"}, "model_type=mistral does not match"),
    "two architectures": ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "is not supported"),
    "ties in words": ({"tie_word_embeddings": "true"}, "must be true or false"),
    "a size that is none": ({"num_hidden_layers": 4.0}, "has no valid num_hidden_layers"),
    "half a head": ({"head_dim": 16.0}, "has no valid head_dim"),
    "no head": ({"head_dim": 0}, "has no valid head_dim"),
    "windows of nothing": ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 0}, "sliding[-_]window"),
}
"""What a config of any family may not contain."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model of each family, with plain rotary embeddings."""
    folder = tmp_path_factory.mktemp("meaning")
    plain = {"rope_parameters": {"rope_type": "default", **THETA}}
    return {family: make_model(family, folder / family, seed=7, **plain) for family in ROTARY}


def changed(source: Path, target: Path, change: Change) -> Path:
    """A folder with the model's weights and a changed config."""
    config = {**json.loads((source / "config.json").read_text()), **change}
    target.mkdir()
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ABSENT}))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("what", MEANT)
def test_a_config_means_what_it_means_to_transformers(what: str, family: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(models[family], tmp_path / "model", MEANT[what])
    ours, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    rotary = ROTARY[family](theirs)
    assert ours.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    torch.testing.assert_close(
        inverse_frequencies(ours.rope, ours.head_dim, torch.device("cpu")), rotary.inv_freq, rtol=1e-6, atol=0
    )
    assert {
        "max_position_embeddings": ours.max_positions,
        "tie_word_embeddings": ours.tied_embeddings,
        "rms_norm_eps": ours.norm_epsilon,
        "num_key_value_heads": ours.num_key_value_heads,
        "hidden_act": "silu",
    }.items() <= theirs.to_dict().items()
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)


@pytest.mark.parametrize(
    ("what", "positions"),
    [("yarn, original within", 400), ("yarn, no original", 256), ("llama3, original outside", 64), ("whole numbers", 64)],
)
def test_a_context_is_as_long_as_yarn_makes_it(what: str, positions: int, models: dict[str, Path], tmp_path: Path) -> None:
    change = {**MEANT[what], "max_position_embeddings": 64}
    architecture = read_architecture(changed(models["qwen2"], tmp_path / "model", change))
    assert (architecture.max_positions, architecture.context_length) == (64, positions)


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_mean_something_else_is_refused(what: str, models: dict[str, Path], tmp_path: Path) -> None:
    change, says = REFUSED[what]
    for family, model in models.items():
        folder = changed(model, tmp_path / family, change)
        with pytest.raises(ModelError, match=says) as raised:
            read_architecture(folder)
        assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("what", ["yarn, original outside", "llama3, original outside", "scaling and parameters, the same"])
def test_logits_are_those_of_transformers(
    what: str, family: str, models: dict[str, Path], ranks1: RankPool, tmp_path: Path
) -> None:
    """The results differ from the plain model's by far more than rounding."""
    folder = changed(models[family], tmp_path / "model", MEANT[what])
    tokens = torch.randint(0, 67, (96,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        expected, plain = (
            load_model(path, torch.float32)(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1).numpy()
            for path in (folder, models[family])
        )
    (result,) = ranks1.run(conversion_ranks.logits, str(folder), {}, [tokens])
    ours = torch.tensor(result).log_softmax(-1).numpy()
    assert np.abs(ours - expected).max() < 1e-4 < 1e-2 < np.abs(plain - expected).max()


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 8, "num_local_experts": 4},
        {"num_local_experts": "8"},
        {"num_experts_per_tok": 9},
        {"num_experts_per_tok": None},
        {"norm_topk_prob": "yes"},
        {"moe_intermediate_size": 48.0},
        {"shared_expert_intermediate_size": 48},
        {"decoder_sparse_step": 0},
        {"decoder_sparse_step": 100},
        {"mlp_only_layers": [100]},
        {"mlp_only_layers": 1},
    ],
)
def test_experts_that_cannot_be_are_refused(change: Change, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        read_architecture(changed(models["qwen3_moe"], tmp_path / "model", change))
    assert "\n" not in str(raised.value)


def test_a_family_without_a_number_of_key_heads_has_its_own_default(models: dict[str, Path], tmp_path: Path) -> None:
    """Llama's default is the number of heads; the others' is a number that only the original model has, and is refused."""
    change = {"num_key_value_heads": ABSENT, "max_position_embeddings": ABSENT}
    folder = changed(models["llama"], tmp_path / "llama", change)
    ours, theirs = read_architecture(folder), AutoConfig.from_pretrained(folder)
    assert (ours.num_key_value_heads, ours.max_positions) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        with pytest.raises(ModelError, match="has no valid num_key_value_heads"):
            read_architecture(changed(models[family], tmp_path / family, change))


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("head", ["another", "equal", "equal in another dtype", "of another size", "one bit off"])
def test_a_head_beside_tied_embeddings(family: str, head: str, models: dict[str, Path], tmp_path: Path) -> None:
    """An output head is allowed only if it is a copy of the embeddings: `transformers` would compute with another head (a first
    token's log-probs are off by tens of nats), vLLM without it."""
    folder = changed(models[family], tmp_path / "model", {"tie_word_embeddings": True})
    tensors = load_file(models[family] / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    off = embeddings.clone()
    off.view(torch.int32)[-1, -1] ^= 1
    tensors["lm_head.weight"] = {
        "another": tensors["lm_head.weight"],
        "equal": embeddings.clone(),
        "equal in another dtype": embeddings.bfloat16(),
        "of another size": torch.cat([embeddings, embeddings[:1]]),
        "one bit off": off,
    }[head]
    if head == "equal in another dtype":
        tensors["model.embed_tokens.weight"] = embeddings.bfloat16().float()
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    architecture = read_architecture(folder)
    rules = FAMILIES[architecture.family].rules(architecture)
    with HFWeights(folder) as weights:
        if head.startswith("equal"):
            check_names(weights, architecture, rules)
            return
        with pytest.raises(ModelError, match=r"holds lm_head[.]weight, which differs from the embeddings") as raised:
            check_names(weights, architecture, rules)
    assert "\n" not in str(raised.value)


def stale_single_file(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"of an earlier save")


def stale_shard(model: Path) -> None:
    shutil.copy(sorted(model.glob("*.safetensors"))[0], model / "model-00099-of-00099.safetensors")


def half_precision_variant(model: Path) -> None:
    shutil.copy(sorted(model.glob("*.safetensors"))[0], model / "model.fp16.safetensors")


def adapter(name: str) -> Any:
    return lambda model: (model / name).write_text("{}")


def same_tensor_twice(model: Path) -> None:
    first, second = sorted(model.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, metadata={"format": "pt"})


def index_of_nothing(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {}}')


def no_index(model: Path) -> None:
    (model / "model.safetensors.index.json").unlink()


RIVALS = {
    "an old single file": (stale_single_file, "holds model.safetensors, which does not belong to model.safetensors.index.json"),
    "an old shard": (stale_shard, "holds model-00099-of-00099.safetensors, which does not belong"),
    "a variant": (half_precision_variant, "holds model.fp16.safetensors, which does not belong"),
    "an adapter's config": (adapter("adapter_config.json"), "holds an adapter .adapter_config.json."),
    "an adapter's weights": (adapter("adapter_model.safetensors"), "holds an adapter .adapter_model.safetensors."),
    "an adapter, pickled": (adapter("adapter_model.bin"), "holds an adapter .adapter_model.bin."),
    "a tensor twice": (same_tensor_twice, "both model-.* hold .*: remove one of them"),
    "shards without an index": (no_index, "holds model-00001.*, but not model.safetensors.index.json"),
    "an index of nothing": (index_of_nothing, "is not a valid index"),
}


@pytest.mark.parametrize("what", RIVALS)
def test_weights_that_others_would_read_are_refused(what: str, tmp_path: Path) -> None:
    spoil, says = RIVALS[what]
    model = make_model("qwen2", tmp_path / "model", seed=1, max_shard_size="100KB")
    spoil(model)
    with pytest.raises(ModelError, match=says) as raised:
        HFWeights(model)
    assert "\n" not in str(raised.value)


def test_copies_that_nobody_prefers_are_told(tmp_path: Path) -> None:
    model = make_model("qwen2", tmp_path / "model", seed=1)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
        (model / name).write_bytes(b"")
    assert unread_files(model) == ["consolidated.safetensors", "pytorch_model.bin"]
    HFWeights(model)


def test_an_adapter_alone_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelError, match="its base org/base is not a model folder here"):
        read_architecture(tmp_path)


def test_a_key_with_two_values_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(models["qwen2"], tmp_path / "model", {})
    written = (folder / "config.json").read_text()
    (folder / "config.json").write_text(written.replace("{", '{"num_attention_heads": 8, ', 1))
    with pytest.raises(ModelError, match=r"config.json is not valid JSON: 'num_attention_heads' is 8 and 4"):
        read_architecture(folder)
    (folder / "config.json").write_text(written.replace("{", '{"num_attention_heads": 4, ', 1))
    assert read_architecture(folder).num_attention_heads == 4

"""Every family computes what `transformers` computes, in every layout; what is not supported is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrl_mcore.errors import ModelError
from kdrl_mcore.model.families import FAMILIES, read_architecture
from tests.reference.dense import load_model
from tests.reference.tiny_models import make_model
from tests.support import conversion_ranks
from tests.support.config_keys import IGNORED, effects, markdown
from tests.support.ranks import RankPool
from tests.support.zoo import FAMILIES as FAMILIES_TRAINED  # whose log-probs test_family_agreement.py compares in every layout

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 linear": ("qwen3", {"rope_parameters": LINEAR}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "ministral": ("ministral", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}),
    "seed_oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "phi3": ("phi3", {}),
    "phi3 windows": ("phi3", {"sliding_window": 20, "num_key_value_heads": 4}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "gemma3": ("gemma3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe some dense": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe groups": ("glm4_moe", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "use_qk_norm": False}),
    "qwen3_moe unnormalized": ("qwen3_moe", {"norm_topk_prob": False, "rope_parameters": YARN}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model, on disk."""
    folder = tmp_path_factory.mktemp("families")
    return {
        name: make_model(family, folder / name.replace(" ", "_"), seed=3, **settings)
        for name, (family, settings) in MODELS.items()
    }


def sequences() -> list[list[int]]:
    """Packed sequences of uneven length, the longest beyond the original context of the stretched models."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 67, (length,), generator=generator).tolist() for length in (3, 17, 17, 96)]


def agree(name: str, models: dict[str, Path], pool: RankPool, layout: dict[str, Any]) -> None:
    """The logits of a model in a layout are those of `transformers`, to 1e-4 of their magnitude."""
    given = sequences()
    model = load_model(models[name], torch.float32)
    with torch.no_grad():
        expected = np.concatenate([model(torch.tensor([tokens]), use_cache=False).logits[0].numpy() for tokens in given])
    (result,) = [each for each in pool.run(conversion_ranks.logits, str(models[name]), layout, given) if each is not None][:1]
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_logits_on_one_rank(name: str, models: dict[str, Path], ranks1: RankPool) -> None:
    agree(name, models, ranks1, {})


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}], ids=["tp2", "pp2"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES_TRAINED])
def test_logits_on_two_ranks(name: str, layout: dict[str, Any], models: dict[str, Path], ranks2: RankPool) -> None:
    agree(name, models, ranks2, layout)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in FAMILIES_TRAINED])
def test_logits_on_four_ranks(name: str, models: dict[str, Path], ranks4: RankPool) -> None:
    agree(name, models, ranks4, {"tensor": 2, "pipeline": 2})


@pytest.mark.parametrize(
    "layout",
    [{"expert": 2}, {"tensor": 2, "expert": 2}, {"tensor": 2, "sequence_parallel": True}],
    ids=["ep2", "tp2-ep2", "tp2-sp"],
)
def test_logits_with_expert_parallelism(layout: dict[str, Any], models: dict[str, Path], ranks2: RankPool) -> None:
    agree("qwen3_moe", models, ranks2, layout)


def test_logits_with_expert_parallelism_in_a_pipeline(models: dict[str, Path], ranks4: RankPool) -> None:
    agree("qwen3_moe", models, ranks4, {"pipeline": 2, "expert": 2})


def test_a_yarn_model_differs_from_the_plain_one(models: dict[str, Path]) -> None:
    """The setting has an effect, so the agreement above is not that of two models that ignore it."""
    tokens = torch.tensor([sequences()[-1]])
    config = json.loads((models["qwen2 yarn"] / "config.json").read_text())
    model = load_model(models["qwen2 yarn"], torch.float32)
    stretched = model(tokens).logits
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    plain = load_model(models["qwen2 yarn"], torch.float32)
    plain.model.rotary_emb = type(plain.model.rotary_emb)(type(plain.config)(**config))
    assert (stretched - plain(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    "family, change, says",
    [
        ("llama", {"use_sliding_window": True}, "sliding-window"),
        ("qwen3_moe", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding-window"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window=None"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "each of 4 layers"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "each of 4 layers"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "each of 4 layers"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("phi3", {"partial_rotary_factor": 1.5, "rope_parameters": None}, "partial_rotary_factor=1.5"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("qwen2", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope scaling 'longrope'"),
        ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        ("qwen3", {"hidden_size": None}, "has no valid hidden_size"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"mlp_only_layers": [4]}, "mlp_only_layers"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "no layer with experts"),
        ("qwen3_moe", {"num_local_experts": None}, "num_experts"),
        ("qwen2", {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ("qwen2", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "remote code is never run"),
    ],
)
def test_what_is_not_supported_is_refused(
    family: str, change: dict[str, Any], says: str, models: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((models[family] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=says) as raised:
        read_architecture(tmp_path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)


def test_the_older_spelling_of_rope_scaling_means_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((models["llama"] / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    theta = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": parameters}))
    assert read_architecture(tmp_path) == read_architecture(models["llama"])


@pytest.mark.filterwarnings("ignore")
def test_every_key_of_a_config_is_used_or_refused_or_known_to_make_no_difference(models: dict[str, Path]) -> None:
    """The docs page says so: `config_keys.markdown` is its table."""
    found = {name: effects(models[name]) for name in sorted(family for family, settings in MODELS.values() if not settings)}
    known = {key for keys in IGNORED.values() for key in keys}
    for family, keys in found.items():
        assert {key for key, effect in keys.items() if effect == "ignored"} <= known, family
    assert markdown(found) in (Path(__file__).parents[2] / "docs" / "families.md").read_text(), markdown(found)


def test_every_family_has_a_model_above() -> None:
    assert {read.lower().removesuffix("forcausallm") for read in FAMILIES} == {
        family.replace("_", "") for family, _ in MODELS.values()
    }

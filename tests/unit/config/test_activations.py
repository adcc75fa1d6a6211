"""Recomputation and off-loading: wrong names and choices without effect are refused in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.families.base import Architecture, Experts
from tests.reference.tiny_models import make_qwen2

SELECTIVE = "parallel.recompute=selective"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (f"{SELECTIVE} parallel.recompute_modules=[mpl]", "mpl is not one of: core_attn, .*; did you mean 'mlp'"),
        ("parallel.offload_activations=[layernorm]", "layernorm is not one of: qkv_linear"),
        ("parallel.offload_activations=[mlp,mlp]", "names mlp twice"),
        ("parallel.recompute_modules=[core_attn]", "needs parallel.recompute=selective"),
        ("parallel.recompute=full parallel.recompute_modules=[mlp]", "needs parallel.recompute=selective"),
        (f"{SELECTIVE} parallel.recompute_modules=[]", "with no parallel.recompute_modules"),
        (f"{SELECTIVE} parallel.recompute_modules=[moe,moe_act]", "moe already recomputes moe_act"),
        ("parallel.recompute=full parallel.offload_activations=[mlp]", "has nothing to move"),
        (f"{SELECTIVE} parallel.offload_activations=[mlp]", "has mlp and parallel.offload_activations has mlp"),
        (f"{SELECTIVE} parallel.recompute_modules=[layernorm] parallel.offload_activations=[qkv_linear]", "has layernorm and"),
        ("parallel.offload_activations=[attn_proj]", "is the output of core_attn"),
        ("parallel.offload_min_elements=-1", "parallel.offload_min_elements"),
    ],
)
def test_what_does_nothing_is_refused(settings: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        load_config(["objective=sft", "student.path=x", "data.train=x", *settings.split()])
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    return read_architecture(str(make_qwen2(tmp_path_factory.mktemp("model"), seed=1)))


@pytest.mark.parametrize(
    ("modules", "offload", "experts", "transformer_engine", "told"),
    [
        ("moe", "", False, False, "no experts: name mlp"),
        ("moe_act", "", False, True, "no experts: name mlp"),
        ("mlp", "", True, False, "name moe"),
        ("", "moe", False, False, "parallel.offload_activations: moe does nothing here"),
        ("moe_act", "", True, False, "needs Transformer Engine"),
        ("layernorm", "", False, True, "contain the norms"),
        ("mlp moe", "", False, False, None),  # a layer has only one of the two
        ("mlp moe", "qkv_linear", True, False, None),
        ("layernorm", "", False, False, None),
        ("layernorm moe_act", "", True, True, None),
        ("layernorm", "", False, None, None),  # the planner cannot know
    ],
)
def test_what_the_model_does_not_have_is_refused(
    modules: str, offload: str, experts: bool, transformer_engine: bool | None, told: str | None, dense: Architecture
) -> None:
    architecture = replace(dense, experts=Experts(8, 2, 32, True)) if experts else dense
    activations = Activations("selective", tuple(modules.split()), tuple(offload.split()))
    if told is None:
        activations.check(architecture, transformer_engine=transformer_engine)
        return
    with pytest.raises(ConfigError, match=told):
        activations.check(architecture, transformer_engine=transformer_engine)

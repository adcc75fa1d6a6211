"""What LoRA cannot train is refused in one line: by the configuration, by the model, and by the folder to start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kdrl_mcore.config import LoraConfig, load_config
from kdrl_mcore.convert.fingerprint import fingerprint
from kdrl_mcore.convert.peft_files import peft_config
from kdrl_mcore.convert.peft_folder import check_peft_folder, check_student_base, check_teacher_adapters
from kdrl_mcore.errors import ConfigError, ModelError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.lora_targets import check_lora, check_stages
from tests.reference.tiny_models import make_model
from tests.support import ROOT

SHAPES = ROOT / "kdrl_mcore" / "planning" / "shapes"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.lora.path=a"], "student.lora.path is for adapters: set student.lora.rank > 0"),
        (["student.lora.alpha=1"], "student.lora.alpha is for adapters"),
        (["student.lora.target_modules=[q_proj]"], "student.lora.target_modules is for adapters"),
        (["student.lora.rank=8", "student.lora.target_modules=[]"], "is empty, so nothing would be trained"),
        (["student.lora.rank=8", "student.lora.target_modules=[q_proj,q_proj]"], "names q_proj twice"),
        (
            ["student.lora.rank=8", "student.lora.target_modules=[qproj]"],
            "qproj is not one of: .* did you mean 'q_proj'",
        ),
        (
            [
                *("student.lora.rank=8", "student.lora.target_modules=[lm_head]", "teacher.weights=average"),
                *("objective.beta.init=1", "objective.kd.estimator=exact"),
            ],
            "needs an output head without an adapter: leave lm_head out",
        ),
        (["student.lora.target_parameters=[mlp.experts.down_proj]"], "student.lora.target_parameters is for adapters"),
        (
            ["student.lora.rank=8", "student.lora.target_parameters=[experts.gate_up_proj]"],
            "experts.gate_up_proj is not one of: .* did you mean 'mlp.experts.gate_up_proj'",
        ),
        (["teacher.weights=base", "objective.beta.init=1"], "student.lora.rank=0: set the rank"),
        (["teacher.weights=adapters", "objective.beta.init=1"], "are those in a PEFT folder: name it with teacher.path"),
        (["teacher.weights=adapters", "teacher.path=a", "objective.beta.init=1"], "student.lora.rank=0: set the rank"),
        (["rollout=vllm", "rollout.vllm.refit_adapters=true", "student.lora.rank=8"], "rollout.vllm.placement=server"),
        (
            [
                *("rollout=vllm", "rollout.vllm.refit_adapters=true", "rollout.vllm.placement=server", "student.lora.rank=8"),
                "student.lora.target_parameters=[mlp.experts.down_proj]",
            ],
            "is not for adapters of experts",
        ),
        (
            [
                *("rollout=vllm", "rollout.vllm.refit_adapters=true", "rollout.vllm.placement=server", "student.lora.rank=8"),
                "student.lora.target_modules=[q_proj,lm_head]",
            ],
            "or of lm_head",
        ),
        (
            ["rollout=vllm", "rollout.vllm.refit_adapters=true", "rollout.vllm.placement=server", "student.lora.rank=600"],
            "takes adapters of rank 512 at most",
        ),
    ],
)
def test_the_configuration_refuses(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(["student.path=s", "objective=grpo", *words])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "model", "tensor", "message"),
    [
        ({"rank": 8}, "Qwen3-30B-A3B", 1, r"gate_proj is not supported in a mixture of experts \(Qwen3MoeForCausalLM\)"),
        (
            {"rank": 8, "target_parameters": ["mlp.experts.down_proj"]},
            "DeepSeek-R1-Distill-Qwen-1.5B",
            1,
            "names weights of experts, but Qwen2ForCausalLM has none",
        ),
        (
            {"rank": 800, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
            "Qwen3-30B-A3B",
            1,
            "rank=800 is more than the 512",
        ),
        ({"rank": 8}, "DeepSeek-R1-Distill-Qwen-1.5B", 4, "of 2 key/value heads with parallel.tensor=4"),
        ({"rank": 300}, "DeepSeek-R1-Distill-Qwen-1.5B", 1, "rank=300 is more than the 256 rows"),
    ],
)
def test_the_model_refuses(settings: dict[str, Any], model: str, tensor: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lora(LoraConfig(**settings), read_architecture(SHAPES / model), tensor)


def test_a_fused_projection_has_no_adapter_of_its_parts(tmp_path: Path) -> None:
    phi = read_architecture(make_model("phi3", tmp_path, seed=1))
    with pytest.raises(ConfigError, match="Phi3ForCausalLM has no separate q_proj"):
        check_lora(LoraConfig(rank=4), phi, 1)
    check_lora(LoraConfig(rank=4, target_modules=["o_proj", "down_proj"]), phi, 1)


def test_a_tied_head_and_stages_without_adapters_are_refused(tmp_path: Path) -> None:
    tied = read_architecture(make_model("qwen2", tmp_path, seed=1, tie_word_embeddings=True))
    lora = LoraConfig(rank=4, target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="lm_head of this Qwen2ForCausalLM is its embedding"):
        check_lora(lora, tied, 1)
    whole = read_architecture(SHAPES / "DeepSeek-R1-Distill-Qwen-1.5B")
    check_stages(lora, whole, 1)
    with pytest.raises(ConfigError, match=r"layers 0 to 13 form a pipeline stage where student.lora adapts nothing"):
        check_stages(lora, whole, 2)


def test_attention_beside_experts_and_other_projections_are_not_refused() -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    check_lora(LoraConfig(rank=8, target_modules=attention), read_architecture(SHAPES / "Qwen3-30B-A3B"), 4)
    others = ["o_proj", "up_proj", "down_proj"]
    check_lora(LoraConfig(rank=8, target_modules=others), read_architecture(SHAPES / "DeepSeek-R1-Distill-Qwen-1.5B"), 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 4}, "has r=4, but student.lora.rank=8"),
        ({"lora_alpha": 1}, "has lora_alpha=1, but student.lora.alpha=32"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern=.* is not supported"),
        ({"peft_type": "IA3"}, "only adapters of peft_type LORA"),
        ({"target_parameters": ["mlp.router.weight"]}, "target_parameters names mlp.router.weight, but only"),
    ],
)
def test_the_folder_refuses(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    lora = LoraConfig(rank=8)
    with pytest.raises(ModelError, match="is not a PEFT folder"):
        check_peft_folder(tmp_path, lora)
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_config(lora, "base")))
    check_peft_folder(tmp_path, lora)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**peft_config(lora, "base"), **changed}))
    with pytest.raises(ModelError, match=message):
        check_peft_folder(tmp_path, lora)


def test_adapters_that_are_not_of_the_base_are_refused(tmp_path: Path) -> None:
    base, other = (make_model("qwen2", tmp_path / name, seed=seed) for name, seed in (("base", 1), ("other", 2)))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(LoraConfig(rank=8), base)))
    check_teacher_adapters(folder, base)
    check_teacher_adapters(folder, shutil.copytree(base, tmp_path / "copy"))
    with pytest.raises(ConfigError, match="not to the student's base"):
        check_teacher_adapters(folder, other)
    with pytest.raises(ConfigError, match="is not a PEFT folder"):
        check_teacher_adapters(base, base)
    with pytest.raises(ConfigError, match=r"set student\.path to their base"):
        check_student_base(folder)
    assert fingerprint(str(folder)) not in (None, fingerprint(str(base)))

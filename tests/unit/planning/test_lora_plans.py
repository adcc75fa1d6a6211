"""Plans of runs that train adapters: frozen weights have no gradients and no optimizer state, and a node holds what is
stated."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import make_setup
from kdrl_mcore.planning.workload import workload_of

RUNS = {
    "lora_70b": (["teacher.path=DeepSeek-R1-Distill-Llama-70B"], 8),
    "lora_32b": ([], 4),
}


def plan_of(experiment: str, *more: str) -> Plan:
    config = load_config([f"experiment={experiment}", *RUNS[experiment][0], "cluster=h100", *more])
    config.cluster.gpus_per_node = RUNS[experiment][1]
    return make_plan(make_setup(config, workload_of(config)))


@pytest.mark.parametrize("experiment", RUNS)
def test_the_experiments_fit_their_gpus(experiment: str) -> None:
    plan = plan_of(experiment)
    assert plan.fits and plan.setup.gpus == RUNS[experiment][1]


def test_only_adapters_have_gradients_and_state() -> None:
    rank, hidden, key_value, ffn, layers, tensor = 32, 8192, 1024, 28672, 80, 8
    columns = [(hidden, hidden), (hidden, key_value), (hidden, key_value), (hidden, ffn), (hidden, ffn)]  # A whole, B split
    rows = [(hidden, hidden), (ffn, hidden)]  # A split, B whole
    of_layer = sum(inputs + outputs // tensor for inputs, outputs in columns)
    of_layer += sum(inputs // tensor + outputs for inputs, outputs in rows)
    plan = plan_of("lora_70b")
    (stage,) = plan.setup.student.shard.stages
    assert stage.adapters == layers * rank * of_layer
    kinds = {item.kind: item.bytes for item in plan.memory[0].items}
    assert kinds["gradients"] == 4 * stage.adapters and kinds["optimizer"] == 12 * stage.adapters
    full = plan_of("lora_70b", "student.lora={rank: 0, alpha: 32}")
    (whole,) = full.setup.student.shard.stages
    assert not full.fits and whole.parameters == stage.parameters - stage.adapters
    with_reference = plan_of("lora_70b", "objective.reference_kl.coefficient=0.01")
    assert with_reference.memory[0].peak == plan.memory[0].peak  # the reference is the student without its adapters


def test_adapters_of_experts_are_where_the_experts_are() -> None:
    rank, hidden, ffn, experts, layers, here = 8, 2048, 768, 128, 48, 4
    overrides = [
        *("student.path=Qwen3-30B-A3B", "objective=grpo", f"student.lora.rank={rank}", "student.lora.target_modules=[o_proj]"),
        "student.lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
        *(f"parallel.expert={experts // here}", "cluster=h100", "cluster.nodes=8", "cluster.gpus_per_node=8"),
    ]
    config = load_config(overrides)
    setup = make_setup(config, workload_of(config))
    (stage,) = setup.student.shard.stages
    of_expert = rank * (hidden + 2 * ffn + ffn + hidden)
    assert stage.expert_adapters == layers * here * of_expert == stage.trained_experts
    assert stage.adapters - stage.expert_adapters == layers * rank * (4096 + hidden)
    assert setup.student.parameters == 30_532_122_624  # the model's own

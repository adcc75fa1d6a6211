"""Sampling ahead: settings that contradict each other or have no effect are refused in one line."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["rollout.steps_ahead=1"], "rollout.vllm.placement=server"),
        (["rollout=vllm", "rollout.steps_ahead=1"], "rollout.vllm.placement=server"),
        (
            ["objective=grpo", "rollout=vllm", 'rollout.vllm.extra=["kv_cache_dtype"]'],
            "rollout.vllm.extra: 'kv_cache_dtype' is not NAME=VALUE",
        ),
        (
            ["objective=grpo", "rollout=vllm", 'rollout.vllm.extra=["tensor_parallel_size=2"]'],
            "tensor_parallel_size follows from other settings",
        ),
        (["objective=grpo", "rollout=vllm", 'rollout.vllm.extra=["block_size=16","block_size=32"]'], "names block_size twice"),
        (["rollout.max_age=2"], "rollout.max_age is for responses that are sampled ahead: set rollout.steps_ahead"),
        (["rollout.unfinished=keep"], "rollout.unfinished is for responses that are sampled ahead"),
        (
            ["rollout=vllm", "rollout.vllm.placement=server", "rollout.steps_ahead=3", "rollout.max_age=2"],
            "rollout.max_age=2 is less than rollout.steps_ahead=3",
        ),
        (["rollout=vllm", "teacher.score_while_sampling=true"], "rollout.vllm.placement=server"),
        (
            [
                "rollout=vllm",
                "rollout.vllm.placement=server",
                "rollout.steps_ahead=1",
                "objective.sampler_correction.kind=none",
            ],
            "objective.sampler_correction.kind=truncate",
        ),
    ],
)
def test_sampling_beside_other_work_needs_other_devices_and_a_correction(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(overrides)

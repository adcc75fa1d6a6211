"""The parts of a refit that need no ranks: buckets, checksums, the drift of a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import ConfigError, NumericalError
from kdrl_mcore.rollout.refit.stream import checksum, cut, device_checksum, digest, num_bytes


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 40))
def test_buckets_hold_every_byte_once_and_are_full(sizes: list[int], bucket_bytes: int) -> None:
    tensors = {f"t{index}": size for index, size in enumerate(sizes)}
    buckets = list(cut(tensors, bucket_bytes))
    seen = [
        (piece.name, byte) for bucket in buckets for piece in bucket for byte in range(piece.start, piece.start + piece.length)
    ]
    assert seen == [(name, byte) for name, size in tensors.items() for byte in range(size)]
    assert all(num_bytes(bucket) == bucket_bytes for bucket in buckets[:-1]) and num_bytes(buckets[-1]) <= bucket_bytes
    for bucket in buckets:
        assert [piece.offset for piece in bucket] == [sum(p.length for p in bucket[:i]) for i in range(len(bucket))]


@pytest.mark.parametrize("of", [checksum, device_checksum])
@given(data=st.binary(min_size=2, max_size=60), place=st.integers(0, 59), bit=st.integers(0, 7))
def test_a_checksum_sees_a_changed_bit_and_a_changed_order(of: object, data: bytes, place: int, bit: int) -> None:
    assert callable(of)
    bytes_N = torch.tensor(list(data), dtype=torch.uint8)
    other_N = bytes_N.clone()
    other_N[place % len(data)] ^= 1 << bit
    assert of(bytes_N) == of(bytes_N.clone()) != of(other_N)
    words = torch.arange(8 * 6, dtype=torch.uint8).view(6, 8)
    assert of(words.flatten()) != of(words.flip(0).flatten())


def test_the_digest_is_that_of_the_tensors_not_of_their_order() -> None:
    table, sums = {"a": ((2, 3), "float32"), "b": ((6,), "float32")}, {"a": "1", "b": "2"}
    assert digest(table, sums) == digest(dict(reversed(table.items())), sums)
    assert digest(table, sums) != digest({**table, "a": ((3, 2), "float32")}, sums) != digest(table, {"a": "2", "b": "1"})


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


@pytest.mark.parametrize(
    "overrides, metrics, wrong",
    [
        ([], {"drift_mean": 1e-5, "drift_max": 2e-3}, True),
        ([], {"drift_mean": 1e-5, "drift_max": 9e-4}, False),
        (["rollout.max_log_prob_drift=0.01"], {"drift_mean": 1e-5, "drift_max": 2e-3}, False),
        (["model.dtype=bfloat16"], {"drift_mean": 0.01, "drift_max": 2.0}, False),
        (["model.dtype=bfloat16"], {"drift_mean": 0.06, "drift_max": 0.2}, True),
        (["batch.updates_per_step=2"], {"drift_mean": 1.0, "drift_max": 1.0}, False),
        (["rollout.top_p=0.9"], {"drift_mean": 1.0, "drift_max": 1.0}, False),
        (["rollout=replay", "rollout.path=r.jsonl"], {"drift_mean": 1.0, "drift_max": 1.0}, False),
        (
            ["rollout=vllm", "rollout.vllm.placement=server", "rollout.steps_ahead=1"],
            {"drift_mean": 1.0, "drift_max": 1.0},
            False,
        ),
    ],
)
def test_drift_beyond_its_bound_ends_the_run_where_both_have_the_same_weights(
    overrides: list[str], metrics: dict[str, float], wrong: bool
) -> None:
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.monitoring.drift import check_drift

    config = load_config(["objective=grpo", "objective.sampler_correction.kind=truncate", *overrides])
    if wrong:
        with pytest.raises(NumericalError, match="step 7: the log-probs of sampler and trainer differ"):
            check_drift(config, 7, metrics)
    else:
        check_drift(config, 7, metrics)

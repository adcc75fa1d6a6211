"""The experts that a sampler chose, as rollouts and rollout files hold them: [prompt and response tokens - 1, layers with
experts, experts of a token]. The last token of a response has no row: the sampler never read it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_mcore.errors import DataError
from kdrl_mcore.types import ExpertIds, Rollout

_TYPES = ("uint8", "int16")


def compact(experts: NDArray[Any], num_experts: int) -> ExpertIds:
    """The same numbers in the smallest type that holds `num_experts`."""
    return experts.astype(np.uint8 if num_experts <= 256 else np.int16)


def encode(experts: ExpertIds) -> dict[str, Any]:
    """As JSON: type, shape, and the numbers in base64."""
    little = experts.astype(experts.dtype.newbyteorder("<"))
    return {"type": experts.dtype.name, "shape": list(experts.shape), "data": base64.b64encode(little.tobytes()).decode()}


def decode(value: Any) -> ExpertIds:
    """The inverse of `encode`.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict) or value.get("type") not in _TYPES or not isinstance(value.get("shape"), list):
        raise ValueError(f"it needs type ({' or '.join(_TYPES)}), shape and data")
    dtype = np.dtype(value["type"]).newbyteorder("<")
    numbers = np.frombuffer(base64.b64decode(str(value.get("data")), validate=True), dtype=dtype)
    return numbers.reshape(value["shape"]).astype(value["type"])


def check_experts(rollouts: Sequence[Rollout], layers: int, per_token: int, count: int) -> None:
    """Check that every rollout has the experts of each token but the last.

    Raises:
        DataError: on every rank, as all hold the same rollouts: some are missing or are none of the model's.
    """
    for rollout in rollouts:
        where = f"prompt {rollout.prompt_id}, response {rollout.group_id}"
        if rollout.experts is None:
            raise DataError(
                f"rollout.replay_experts: {where} has no experts: sample with this setting, or replay the file of such a run"
            )
        expected = (rollout.num_tokens - 1, layers, per_token)
        if rollout.experts.shape != expected:
            raise DataError(
                f"rollout.replay_experts: {where} has experts {list(rollout.experts.shape)} instead of {list(expected)} "
                "(tokens but the last, layers with experts, experts of a token): no row may be missing; sample again"
            )
        ordered = np.sort(rollout.experts, axis=2)
        if ordered.size and (ordered.min() < 0 or ordered.max() >= count or (np.diff(ordered, axis=2) == 0).any()):
            raise DataError(
                f"rollout.replay_experts: {where} names experts beyond the model's {count}, or one twice for a token: sample "
                "again with this model"
            )

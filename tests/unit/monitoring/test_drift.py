"""The drift between sampler and trainer: a step whose drift exceeds its bound ends the run."""

from __future__ import annotations

import pytest

from kdrl_mcore.config import load_config
from kdrl_mcore.errors import NumericalError


@pytest.mark.parametrize(
    "overrides, metrics, wrong",
    [
        ([], {"drift_mean": 1e-5, "drift_max": 2e-3}, True),
        ([], {"drift_mean": 1e-5, "drift_max": 9e-4}, False),
        (["rollout.max_log_prob_drift=0.01"], {"drift_mean": 1e-5, "drift_max": 2e-3}, False),
        (["model.dtype=bfloat16"], {"drift_mean": 0.01, "drift_max": 2.0}, False),
        (["model.dtype=bfloat16"], {"drift_mean": 0.06, "drift_max": 0.2}, True),
        (["batch.updates_per_step=2"], {"drift_mean": 1.0, "drift_max": 1.0}, False),
        (["rollout.top_p=0.9"], {"drift_mean": 0.04, "drift_max": 1.0}, False),
        (["rollout.top_k=20"], {"drift_mean": 0.06, "drift_max": 0.06}, True),
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

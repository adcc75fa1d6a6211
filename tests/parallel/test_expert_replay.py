"""The student's routers take the experts that the sampler chose: the gradient is that of the dense reference with these
experts, in every layout, and the drift between sampler and trainer shrinks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdrl_mcore.errors import DataError
from kdrl_mcore.rollout.experts import check_experts
from kdrl_mcore.rollout.files import read_rollouts
from tests.reference.tiny_models import make_model, make_rollouts, make_tokenizer, write_jsonl
from tests.support.expert_training import Probe, check, make_probe
from tests.support.ranks import RankPool
from tests.support.sampling import PROMPTS, drift_of_experts

TP2_SP = "parallel.tensor=2 parallel.sequence_parallel=true"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """A student whose second layer has no experts, and a teacher with experts in the same process, which are its own."""
    folder = tmp_path_factory.mktemp("replay")
    student = make_model("qwen3_moe", folder / "student", seed=11, vocab_size=64, mlp_only_layers=[1])
    teacher = make_model("qwen3_moe", folder / "teacher", seed=12, vocab_size=64)
    made, gradients, overrides = make_probe(folder, student, teacher, num_layers=3)
    return made, gradients, [*overrides, "rollout.replay_experts=true"]


@pytest.mark.parametrize(
    "layout",
    [
        f"{TP2_SP} parallel.expert=2 parallel.recompute=full",
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.recompute=full batch.micro_tokens=40",
        "parallel.context=2 parallel.expert=2 batch.share_prompts=true",
    ],
)
def test_the_gradient_is_that_of_the_dense_reference_with_these_experts(
    layout: str, probe: Probe, ranks2: RankPool, tmp_path: Path
) -> None:
    check(probe, ranks2, layout.split(), tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["router_flip_share"] == pytest.approx(0.75, abs=0.1)  # 2 of 8 experts at random


def test_a_missing_row_or_an_impossible_expert_is_refused(probe: Probe) -> None:
    (rollout, *_) = read_rollouts(probe[0].parent / "rollouts.jsonl")
    check_experts([rollout], 3, 2, 8)
    whole: Any = rollout.experts
    twice, beyond = whole.copy(), whole.copy()
    twice[1, 2], beyond[0, 0, 0] = 4, 8
    for experts, message in (
        (None, "has no experts"),
        (whole[:-1], "no row may be missing"),
        (twice, "one twice for a token"),
        (beyond, "experts beyond the model's 8"),
    ):
        rollout.experts = experts
        with pytest.raises(DataError, match=message):
            check_experts([rollout], 3, 2, 8)


def overrides_of(folder: Path, **shape: Any) -> list[str]:
    student = make_model("qwen3_moe", folder / "student", seed=11, **shape)
    make_tokenizer(student)
    rollouts = write_jsonl(folder / "rollouts.jsonl", make_rollouts(student, seed=13, vocab_size=60))
    overrides = [f"student.path={student}", "rollout=replay", f"rollout.path={rollouts}", "objective=grpo"]
    return [*overrides, "rollout.replay_experts=true", "rollout.max_sequences=9"]


def test_every_layout_records_the_same_experts_also_in_parts(ranks1: RankPool, ranks2: RankPool, tmp_path: Path) -> None:
    overrides = overrides_of(tmp_path, mlp_only_layers=[1])
    (alone,) = ranks1.run(drift_of_experts, overrides, PROMPTS)
    assert alone["replayed"] < 1e-5
    for layout, parts in ((f"{TP2_SP} parallel.expert=2", None), ("parallel.pipeline=2", (3, 30))):
        for found in ranks2.run(drift_of_experts, [*overrides, *layout.split()], PROMPTS, parts):
            assert found["tokens"] == alone["tokens"] and found["replayed"] < 1e-5
            for one, other in zip(found["experts"], alone["experts"], strict=True):
                np.testing.assert_array_equal(np.sort(one, axis=2), np.sort(other, axis=2))


def test_replay_shrinks_the_drift_of_a_mixture_in_bfloat16(ranks1: RankPool, tmp_path: Path) -> None:
    """Measured: 0.016 nats with the trainer's own choices, 0.006 with the sampler's."""
    overrides = overrides_of(tmp_path, num_experts=32, num_experts_per_tok=4)
    (found,) = ranks1.run(drift_of_experts, [*overrides, "model.dtype=bfloat16"], PROMPTS)
    assert found["replayed"] < 0.6 * found["own"], found

"""A decoding step computes what the modules compute, for every family and every kind of split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference.tiny_models import make_model
from tests.support.ranks import RankPool
from tests.support.sampling import assert_close
from tests.support.zoo import FAMILIES, Zoo

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "tp2 sp": {"tensor": 2, "sequence_parallel": True},
    "pp2": {"pipeline": 2},
}
CASES = [
    *((name, "tp2 sp") for name in FAMILIES),
    *(("gemma3", "pp2"), ("granite", "pp2"), ("one_kv_head", "tp2")),
    *(("qwen3_moe", layout) for layout in ("tp2", "pp2")),
    *(("glm4_moe", layout) for layout in ("tp2 sp", "pp2")),
]
PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22]]


def sample_both_ways(path: str, layout: dict[str, Any], limit: int) -> list[list[tuple[list[int], np.ndarray]]]:
    """The tokens and their log-probs, decoded directly and through the modules, and whether direct decoding was used."""
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.types import Prompt
    from tests.support.conversion_ranks import build

    class NoTokenizer:
        eos_ids = frozenset({0})

        def decode_response(self, token_ids: Any) -> str:
            return ""

    # Sequence parallelism needs the random states that only the student's groups set up.
    parts = build(path, layout, student=layout.get("sequence_parallel", False))
    engine = MegatronEngine(parts, NoTokenizer(), 100, lambda: 0)  # type: ignore[arg-type]
    prompts = [Prompt(str(i), "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(PROMPTS)]
    results = []
    for directly in (engine._directly, False):
        engine._directly = directly
        rollouts = engine.generate(prompts, Sampling(1.0, 1.0, limit, 2, (1,)))
        results.append([(each.response_token_ids.tolist(), each.sampler_log_probs) for each in rollouts])
        results[-1].append(([int(directly)], np.zeros(0)))
    return results


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_step_is_that_of_the_modules(name: str, layout: str, zoo: Zoo, ranks2: RankPool, tmp_path: Path) -> None:
    model = make_model(name, tmp_path, seed=3) if name == "qwen3_moe" else zoo.model(name)
    for found, expected in ranks2.run(sample_both_ways, str(model), LAYOUTS[layout], 24):
        assert (found.pop()[0], expected.pop()[0]) == ([1], [0])
        assert max(len(tokens) for tokens, _ in found) > 10
        for (tokens, log_probs), (expected_tokens, expected_log_probs) in zip(found, expected, strict=True):
            assert tokens == expected_tokens
            assert_close(log_probs, expected_log_probs)

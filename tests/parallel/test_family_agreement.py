"""Models of every dense family train as in one dense process with plain transformers: loss, log-probs and all gradients.

The models' sliding windows are shorter than the sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.agreement import Case, check
from tests.support.ranks import RankPool
from tests.support.zoo import FAMILIES, Zoo

TP_PP = "parallel.tensor=2 parallel.pipeline=2 parallel.sequence_parallel=true"
WINDOWS = ("mistral", "olmo3", "gemma3")
CASES = {
    **{f"{name}, tp2 pp2 sp": Case(4, TP_PP, student=name) for name in FAMILIES},
    **{f"{name}, cp2, recompute": Case(2, "parallel.context=2 parallel.recompute=full", student=name) for name in FAMILIES},
    **{f"{name}, cp4": Case(4, "parallel.context=4", student=name) for name in WINDOWS},
    **{f"{name}, prompts shared": Case(2, "batch.share_prompts=true parallel.tensor=2", student=name) for name in WINDOWS},
    "ministral, pp2 interleaved": Case(2, "parallel.pipeline=2 parallel.virtual_pipeline=2", student="ministral"),
    "olmo2, dp4: ranks without tokens": Case(4, student="olmo2", rollouts="two"),
    "olmo2, tp2 without sp, selective recompute": Case(2, "parallel.tensor=2 parallel.recompute=selective", student="olmo2"),
    "granite scored by gemma3, tp2": Case(2, "parallel.tensor=2", student="granite", teacher="gemma3"),
    "gemma3 scored by granite, dp2": Case(2, "teacher.parallel.tensor=2", student="gemma3", teacher="granite"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_loss_log_probs_and_gradients_are_those_of_the_dense_reference(
    case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(case, zoo, pools[case.ranks], tmp_path)

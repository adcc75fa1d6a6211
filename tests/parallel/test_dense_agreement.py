"""The trainer computes what one dense process computes with plain transformers and autograd, for several micro-batches,
layouts of the teacher, models and batches. `test_matrix.py` has every layout of the student.

Loss, log-probs of every token under student and teacher, and the gradient of every parameter, in float32, to 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference.dense import Settings
from tests.support.agreement import JOINT, Case, check
from tests.support.ranks import RankPool
from tests.support.zoo import Zoo

LAYOUTS = {
    # one sequence per micro-batch
    "micro 1, tp1": Case(1, "batch.micro_tokens=1"),
    "micro 1, dp2": Case(2, "batch.micro_tokens=1"),
    "micro 1, pp2": Case(2, "batch.micro_tokens=1 parallel.pipeline=2"),
    # layouts of the teacher that are not in the matrix
    "tp2, teacher tp1": Case(2, "parallel.tensor=2 teacher.parallel.tensor=1"),
    "dp2, teacher pp2": Case(2, "teacher.parallel.pipeline=2 batch.micro_tokens=40"),
    # activations recomputed in the backward pass
    "recompute, tp2 sp": Case(2, "parallel.tensor=2 parallel.sequence_parallel=true parallel.recompute=full"),
    "recompute, pp2": Case(2, "parallel.pipeline=2 parallel.recompute=full batch.micro_tokens=40"),
}

MODELS = {
    "tied, tp1": Case(1, student="tied"),
    "tied, tp2": Case(2, "parallel.tensor=2", student="tied"),
    "tied, pp2": Case(2, "parallel.pipeline=2", student="tied"),
    "tied, tp2 pp2 sp": Case(4, "parallel.tensor=2 parallel.pipeline=2 parallel.sequence_parallel=true", student="tied"),
    "tied, pp2 interleaved": Case(2, "parallel.pipeline=2 parallel.virtual_pipeline=2", student="tied"),
    "tied, pp2 dp2": Case(4, "parallel.pipeline=2", student="tied"),
    "one kv head, tp2": Case(2, "parallel.tensor=2", student="one_kv_head"),
    "one kv head, tp4 sp": Case(4, "parallel.tensor=4 parallel.sequence_parallel=true", student="one_kv_head"),
    "the models' columns are the vocabulary, tp1": Case(1, student="no_tokenizer", teacher="teacher_no_tokenizer"),
    "the models' columns are the vocabulary, tp2": Case(
        2, "parallel.tensor=2", student="no_tokenizer", teacher="teacher_no_tokenizer"
    ),
    "teacher kv heads fewer than its tp": Case(2, "teacher.parallel.tensor=2", teacher="one_kv_head"),
}

BATCHES = {
    "equal rewards, tp2": Case(2, "parallel.tensor=2", rollouts="all_correct"),
    "equal rewards without a teacher, dp2": Case(2, settings=Settings(), teacher=None, rollouts="all_correct"),
    "everything masked, tp2": Case(2, "parallel.tensor=2", replace(JOINT, mask="response"), rollouts="all_correct"),
    "everything masked, pp2": Case(2, "parallel.pipeline=2", replace(JOINT, mask="group"), rollouts="all_correct"),
    "two rollouts, dp4: two ranks have no tokens": Case(4, rollouts="two"),
    "two rollouts, pp2 dp2": Case(4, "parallel.pipeline=2 batch.micro_tokens=1", rollouts="two"),
    "one rollout, dp2: a rank has no tokens": Case(2, settings=replace(JOINT, alpha=0.0), rollouts="one"),
    "one rollout, tp2 dp2 sp": Case(
        4, "parallel.tensor=2 parallel.sequence_parallel=true", replace(JOINT, alpha=0.0), rollouts="one"
    ),
    "one rollout, teacher dp2": Case(
        2, "parallel.tensor=2 teacher.parallel.tensor=1", replace(JOINT, alpha=0.0), rollouts="one"
    ),
    "one rollout, pp2 interleaved: an empty micro-batch": Case(
        2, "parallel.pipeline=2 parallel.virtual_pipeline=2", replace(JOINT, alpha=0.0), rollouts="one"
    ),
}

CASES = {**LAYOUTS, **MODELS, **BATCHES}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_loss_log_probs_and_gradients_are_those_of_the_dense_reference(
    case: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path
) -> None:
    check(case, zoo, pools[case.ranks], tmp_path)

"""Every layout of up to four ranks computes what the dense reference computes.

The layouts are tensor x pipeline x context x data parallel, with and without sequence parallelism and interleaved pipelines.
There are several packed micro-batches of uneven sequences, and the teacher has another layout. Compared, to 1e-4, are the loss,
the log-prob and entropy of every token, and the gradient of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reference.dense import Settings
from tests.support.agreement import JOINT, Case, StudentLayout, case, check
from tests.support.ranks import RankPool
from tests.support.zoo import Zoo


def layouts() -> Iterator[StudentLayout]:
    """All layouts of 1, 2 and 4 ranks."""
    sizes = (1, 2, 4)
    for tensor, pipeline, context, data in ((t, p, c, d) for t in sizes for p in sizes for c in sizes for d in sizes):
        if tensor * pipeline * context * data in sizes:
            for sequence_parallel in (False, True)[: 1 + (tensor > 1)]:
                for virtual_pipeline in (None, 2)[: 1 + (pipeline > 1)]:
                    yield StudentLayout(tensor, pipeline, context, data, sequence_parallel, virtual_pipeline)


LAYOUTS = list(layouts())
FEW = [StudentLayout(1, 2, 1, 1, virtual_pipeline=2), StudentLayout(2, 1, 2, 1, sequence_parallel=True)]
TOP_K = {
    **{
        f"top-k of the {support}, {tail}": replace(JOINT, estimator="top_k", top_k=5, top_k_support=support, top_k_tail=tail)
        for support in ("student", "teacher")
        for tail in ("truncate", "renormalize", "bucket")
    },
    "top-k unbiased, masked": replace(JOINT, estimator="top_k_unbiased", top_k=5, mask="response"),
}


def test_these_are_all_layouts() -> None:
    assert [sum(layout.ranks == ranks for layout in LAYOUTS) for ranks in (1, 2, 4)] == [1, 6, 19]
    assert all(layout in LAYOUTS for layout in FEW)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("estimator", ["k2", "exact"])
def test_every_layout(layout: StudentLayout, estimator: str, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(case(layout, replace(JOINT, estimator=estimator)), zoo, pools[layout.ranks], tmp_path)


@pytest.mark.parametrize("layout", FEW, ids=str)
@pytest.mark.parametrize("settings", TOP_K.values(), ids=list(TOP_K))
def test_every_top_k(layout: StudentLayout, settings: Settings, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(case(layout, settings), zoo, pools[layout.ranks], tmp_path)


SPARSE = {
    "a context rank without a loss row": case(StudentLayout(1, 1, 2, 1), JOINT, "long_prompts"),
    "the same, exact": case(StudentLayout(1, 1, 2, 1), replace(JOINT, estimator="exact"), "long_prompts"),
    "three of four context ranks without a loss row, exact": case(
        StudentLayout(1, 1, 4, 1), replace(JOINT, estimator="exact"), "long_prompts"
    ),
    "the same under tensor and sequence parallelism": case(
        StudentLayout(2, 1, 2, 1, sequence_parallel=True), replace(JOINT, estimator="top_k_unbiased", top_k=5), "long_prompts"
    ),
    "a data rank without a token, exact": case(StudentLayout(1, 1, 2, 2), replace(JOINT, estimator="exact", alpha=0.0), "one"),
    "an empty micro-batch, exact": case(
        StudentLayout(1, 2, 2, 1, virtual_pipeline=2), replace(JOINT, estimator="exact", alpha=0.0), "one"
    ),
    "everything masked, exact": case(
        StudentLayout(1, 1, 2, 1), replace(JOINT, estimator="exact", mask="response"), "all_correct"
    ),
    "beta still zero, exact": Case(
        2,
        "parallel.tensor=2 objective.beta.kind=switch objective.beta.after=1 objective.beta.steps=9",
        replace(JOINT, estimator="exact", beta=0.0),
    ),
    "the models' columns are the vocabulary, exact": replace(
        case(StudentLayout(2, 1, 2, 1), replace(JOINT, estimator="exact")),
        student="no_tokenizer",
        teacher="teacher_no_tokenizer",
    ),
    "tied, exact": replace(case(StudentLayout(1, 2, 2, 1), replace(JOINT, estimator="exact")), student="tied"),
}


@pytest.mark.parametrize("sparse", SPARSE.values(), ids=list(SPARSE))
def test_ranks_with_little_to_do(sparse: Case, zoo: Zoo, pools: dict[int, RankPool], tmp_path: Path) -> None:
    check(sparse, zoo, pools[sparse.ranks], tmp_path)

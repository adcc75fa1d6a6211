"""The core rows of the matrix on a newer Megatron-Core, which `make setup` puts beside the installed one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_mcore.convert.convert import import_hf
from tests.convert import worker
from tests.late_weights import OVERLAPPED
from tests.parallel.test_dense_agreement import JOINT, Case, check
from tests.parallel.test_matrix import StudentLayout, case
from tests.parallel.test_optimizer_agreement import check_adam
from tests.ranks import RankPool
from tests.reference.tiny_models import make_model
from tests.zoo import Zoo

BESIDE = Path(__file__).resolve().parents[2] / ".venv" / "megatron-core-0.19"
EXACT = replace(JOINT, estimator="exact")

pytestmark = pytest.mark.skipif(
    not BESIDE.is_dir(), reason=f"{BESIDE} does not exist: make setup installs it, on Linux on x86-64"
)

ROWS = {
    "tp2, teacher pp2": case(StudentLayout(2, 1, 1, 1), JOINT),
    "tp2 sp, teacher pp2": case(StudentLayout(2, 1, 1, 1, sequence_parallel=True), EXACT),
    "pp2, teacher tp2": case(StudentLayout(1, 2, 1, 1), EXACT),
    "pp2 interleaved": case(StudentLayout(1, 2, 1, 1, virtual_pipeline=2), JOINT),
    "cp2": case(StudentLayout(1, 1, 2, 1), EXACT),
    "dp2": case(StudentLayout(1, 1, 1, 2), JOINT),
    "tied, pp2": replace(case(StudentLayout(1, 2, 1, 1), JOINT), student="tied"),
    "tp2, masked top-k": case(StudentLayout(2, 1, 1, 1), replace(JOINT, estimator="top_k_unbiased", top_k=5, mask="response")),
}


@pytest.fixture(scope="module")
def newer_ranks() -> Iterator[RankPool]:
    pool = RankPool(2, import_first=[str(BESIDE)])
    yield pool
    pool.close()


def version_on_rank() -> tuple[str, str]:
    """The version that this rank has imported, and from where."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    import megatron.core

    return megatron.core.__version__, megatron.core.__file__


def assert_newer(pool: RankPool) -> None:
    """That it was the newer version which ran."""
    for version, file in pool.run(version_on_rank):
        assert version.startswith("0.19.") and Path(file).is_relative_to(BESIDE)


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_core_rows(row: Case, zoo: Zoo, newer_ranks: RankPool, tmp_path: Path) -> None:
    check(row, zoo, newer_ranks, tmp_path)
    assert_newer(newer_ranks)


@pytest.mark.parametrize(
    "layout", ["parallel.tensor=2", "", f"parallel.context=2 {OVERLAPPED}"], ids=["tp2", "dp2", "cp2 overlapped"]
)
def test_two_steps_of_adam(layout: str, zoo: Zoo, newer_ranks: RankPool, tmp_path: Path) -> None:
    check_adam(2, layout, True, zoo, newer_ranks, tmp_path)
    assert_newer(newer_ranks)


@pytest.mark.parametrize("family, layout", [("qwen2", {"tensor": 2}), ("qwen3_moe", {"expert": 2})], ids=["tp2", "ep2"])
def test_it_loads_a_converted_model(family: str, layout: dict[str, int], newer_ranks: RankPool, tmp_path: Path) -> None:
    hf = make_model(family, tmp_path / "hf", seed=4)
    import_hf(hf, tmp_path / "megatron", None, lambda total: lambda num_bytes: None)
    assert all(newer_ranks.run(worker.megatron_loads_the_same, str(hf), str(tmp_path / "megatron"), layout))
    assert_newer(newer_ranks)

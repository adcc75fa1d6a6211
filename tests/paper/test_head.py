"""The output head on paper CUDA with Triton's kernels: it never waits for the GPU, and its results are the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.paper_cuda import choose_gpu, import_training
from tests.support.head_cases import HEADS, Sizes, assert_same, run_head
from tests.support.ranks import RankPool

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux on x86-64)")

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
SIZES = Sizes(columns=48, size=43, chunk_tokens=2)


@pytest.fixture(scope="module")
def paper() -> Iterator[RankPool]:
    pool = RankPool(1, preload=import_training, prepare=choose_gpu, backend="nccl")
    yield pool
    pool.close()


def compare_with_cpu(name: str, dtype: torch.dtype) -> dict[str, int]:
    """Assert that the results are equal; returns the head's host syncs by line."""
    from tests.paper_cuda.syncs import syncs

    expected = run_head(name, SIZES, dtype, "torch")
    syncs.clear()
    actual = run_head(name, SIZES, dtype, "auto", device="cuda")
    waited = {where: count for where, count in syncs.items() if where.startswith("vocab_parallel/")}
    assert_same({key: value.cpu() for key, value in actual.items()}, expected, ROUNDING[dtype])
    return waited


def count_syncs_in_torch(name: str) -> dict[str, int]:
    """The head's host syncs by line, without Triton."""
    from tests.paper_cuda.syncs import syncs

    syncs.clear()
    run_head(name, SIZES, torch.float32, "torch", device="cuda")
    return {where: count for where, count in syncs.items() if where.startswith("vocab_parallel/")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_it_equals_the_cpu_and_waits_for_nothing(paper: RankPool, name: str, dtype: torch.dtype) -> None:
    assert paper.run(compare_with_cpu, name, dtype) == [{}]


@pytest.mark.parametrize("name", HEADS)
def test_without_triton_it_waits_for_nothing_either(paper: RankPool, name: str) -> None:
    assert paper.run(count_syncs_in_torch, name) == [{}]


def sum_of_products() -> tuple[float, float]:
    """The error of a sum of many chunks' products of bfloat16 factors: (on the GPU, on the CPU)."""
    from kdrl_mcore.vocab_parallel.products import add_product

    generator = torch.Generator().manual_seed(1)
    chunks = [[torch.randn(7, 16, generator=generator).bfloat16() for _ in range(2)] for _ in range(50)]
    exact = sum((a.double() @ b.double().T for a, b in chunks), start=torch.zeros(7, 7, dtype=torch.float64))
    errors = []
    for device in ("cuda", "cpu"):
        total = torch.full((7, 7), torch.nan, device=device)
        for index, (a, b) in enumerate(chunks):
            add_product(total, a.to(device), b.to(device).T, first=index == 0)
        errors.append(float((total.cpu().double() - exact).norm() / exact.norm()))
    return errors[0], errors[1]


def test_the_weight_gradient_is_not_rounded_to_16_bits_on_its_way(paper: RankPool) -> None:
    ((gpu, cpu),) = paper.run(sum_of_products)
    assert gpu < 1e-6 < 1e-4 < cpu

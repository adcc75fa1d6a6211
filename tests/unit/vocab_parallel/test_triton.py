"""Triton's kernels give the same values and gradients as torch, on the CPU through Triton's interpreter.

The interpreter is chosen when triton is imported, so everything runs in separate ranks that have TRITON_INTERPRET set.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from kdrl_mcore.vocab_parallel import HeadTokens, VocabShard, fused_head
from kdrl_mcore.vocab_parallel.chunk import logits_memory
from kdrl_mcore.vocab_parallel.chunk_logits import LogitsTerms
from kdrl_mcore.vocab_parallel.torch_logits import TorchLogits
from tests.support.head_cases import HEADS, KNOWN, Sizes, assert_same, run_head
from tests.support.interpreter import import_interpreter
from tests.support.ranks import RankPool

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux on x86-64)")

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
TWO_RANKS = {
    "padded": Sizes(columns=41, size=77, tokens=4, taught=3, chunk_tokens=2),
    "rows_for_all_filler": Sizes(columns=64, size=111, tokens=4, taught=3, chunk_tokens=2),
    "a_rank_of_padding": Sizes(columns=24, size=20, tokens=3, taught=2),
}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[RankPool]:
    """Two ranks in which Triton interprets."""
    pool = RankPool(2, preload=import_interpreter, environment={"TRITON_INTERPRET": "1"})
    yield pool
    pool.close()


def compare_alone(name: str, sizes: Sizes) -> None:
    """Rank 0 in float32 and rank 1 in bfloat16, each with the whole vocabulary."""
    dtype = (torch.float32, torch.bfloat16)[dist.get_rank()]
    assert_same(run_head(name, sizes, dtype, "triton"), run_head(name, sizes, dtype, "torch"), ROUNDING[dtype])


def compare_shared(name: str, sizes: Sizes, dtype: torch.dtype) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    results = [run_head(name, sizes, dtype, kernels, group, rank) for kernels in ("triton", "torch")]
    assert_same(*results, ROUNDING[dtype])


def compare_known(sizes: Sizes) -> None:
    """With known tokens of the teacher, either implementation gives what the teacher's logits give."""
    group, rank = dist.group.WORLD, dist.get_rank()
    for name in KNOWN:
        expected = run_head(name, sizes, torch.float32, "torch", group, rank)
        for kernels in ("torch", "triton"):
            assert_same(run_head(name, sizes, torch.float32, kernels, group, rank, known=True), expected, 2e-6)


def compare_columns(remainder: int) -> None:
    """The number of real columns exceeds a multiple of 32 by `remainder`; the weight has rows for all of the filler, for a part
    of it or for none. Rank 0 is in float32 and rank 1 in bfloat16."""
    for padding in (0, 5, 64):
        for name in ("log_prob_entropy_k2", "exact", "forward", "mixed_0.2", "top_k_teacher_renormalize"):
            compare_alone(name, Sizes(columns=32 + remainder + padding, size=32 + remainder, chunk_tokens=2))


def check_filler() -> None:
    """The memory holds NaN: the filler's derivative is zero, and so is that of the weight's padding."""
    columns, shard = 35, VocabShard(None, 0, 48, 35)
    generator = torch.Generator().manual_seed(8)
    logits = logits_memory("triton", 3, columns, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    logits._student_CW.fill_(torch.nan)
    logits._teacher_buffer_CW.fill_(torch.nan)
    hidden_CH, weight_VH, teacher_VG = (torch.randn(n, 8, generator=generator).bfloat16() for n in (3, 48, 41))
    logits.centre(logits.project(hidden_CH, weight_VH, (hidden_CH, teacher_VG), 1.0))
    totals_KC, difference_C = logits.totals(), logits.difference_C()
    assert torch.isfinite(totals_KC).all() and torch.isfinite(difference_C).all()
    number_C = torch.full((3,), -3.0)
    terms = [LogitsTerms(number_C, product_row_C=number_C, comparison_row_C=number_C)]
    d_CV = logits.gradient(terms, None, totals_KC[0], 1.0, shard)
    assert d_CV.shape == (3, 48) and d_CV[:, :columns].all() and not d_CV[:, columns:].any()


def compare_largest(columns: int) -> None:
    """Among many equal logits in several blocks, the lower columns come first, as with plain sorting; a row of NaN keeps k
    columns."""
    from kdrl_mcore.vocab_parallel import triton_kernels
    from kdrl_mcore.vocab_parallel.logits import local_top_k

    generator = torch.Generator().manual_seed(9)
    logits_CV = torch.randint(-3, 4, (6, columns), generator=generator).bfloat16()
    logits_CV[1], logits_CV[2] = 0.0, torch.nan
    logits_CV[3, columns // 2 :] = torch.nan
    for top_k in (1, min(columns, 20), columns):
        chosen_CK = triton_kernels.largest(logits_CV, top_k)
        expected_CK = logits_CV.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        for row in (0, 1, 4, 5):
            assert torch.equal(chosen_CK[row], expected_CK[row].sort().values)
            assert torch.equal(local_top_k(logits_CV, top_k)[row], expected_CK[row])
        assert chosen_CK[2].tolist() == local_top_k(logits_CV, top_k)[2].tolist() == list(range(top_k))
        assert len(set(chosen_CK[3].tolist())) == top_k


def compare_no_tokens() -> None:
    results = run_head("log_prob_entropy_k2", Sizes(columns=7, size=6, tokens=0), torch.float32, "triton")
    assert float(results["loss"]) == 0.0 and not results["d_hidden"].any() and not results["d_weight"].any()


def compare_statistics(columns: int, offset: float) -> None:
    """Compared with float64, for strided rows of any length and logits of any size."""
    from kdrl_mcore.vocab_parallel import triton_kernels

    generator = torch.Generator().manual_seed(5)
    z_CV, y_CV = (torch.randn(2, columns + 3, generator=generator)[:, :columns] * 3 + offset for _ in range(2))
    m_C, total_C, product_C, n_C, teacher_C, difference_C = triton_kernels.statistics(z_CV, y_CV)
    z, y = z_CV.double() - z_CV.double().amax(1, keepdim=True), y_CV.double() - y_CV.double().amax(1, keepdim=True)
    assert torch.equal(m_C, z_CV.amax(1)) and torch.equal(n_C, y_CV.amax(1))
    for actual, expected_CV in (
        (total_C, z.exp()),
        (product_C, z.exp() * z),
        (teacher_C, y.exp()),
        (difference_C, z.exp() * (y - z)),
    ):
        torch.testing.assert_close(actual.double(), expected_CV.sum(1), rtol=1e-5, atol=1e-5)
    *same, forward_C, entropy_C = triton_kernels.statistics(z_CV, y_CV, forward=True, teacher_entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(same, (m_C, total_C, product_C, n_C, teacher_C), strict=True))
    torch.testing.assert_close(forward_C.double(), (y.exp() * (y - z)).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_C.double(), (y.exp() * y).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_one_rank_equals_torch_in_float32_and_bfloat16(interpreted: RankPool, name: str) -> None:
    interpreted.run(compare_alone, name, Sizes(columns=45, size=43, chunk_tokens=2))


@pytest.mark.parametrize(
    "name", ["log_prob_entropy_k2", "exact", "forward", "clipped_0.1", "mixed_0.2", "top_k_student_bucket"]
)
def test_rows_of_several_blocks_equal_torch(interpreted: RankPool, name: str) -> None:
    interpreted.run(compare_alone, name, Sizes(columns=4999, size=4997, tokens=2, taught=1))


@pytest.mark.parametrize("remainder", [0, 1, 15, 16, 31])
def test_any_number_of_columns_equals_torch(interpreted: RankPool, remainder: int) -> None:
    interpreted.run(compare_columns, remainder)


def test_what_stands_behind_the_columns_counts_for_nothing(interpreted: RankPool) -> None:
    interpreted.run(check_filler)


@pytest.mark.parametrize("columns", [1, 37, 5000])
def test_of_equal_logits_the_lower_columns_are_the_largest(interpreted: RankPool, columns: int) -> None:
    interpreted.run(compare_largest, columns)


@pytest.mark.parametrize("sizes", ["padded", "rows_for_all_filler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_equal_torch_with_a_padded_vocabulary(
    interpreted: RankPool, name: str, dtype: torch.dtype, sizes: str
) -> None:
    interpreted.run(compare_shared, name, TWO_RANKS[sizes], dtype)


@pytest.mark.parametrize("name", HEADS)
def test_two_ranks_equal_torch_where_one_holds_only_padding(interpreted: RankPool, name: str) -> None:
    interpreted.run(compare_shared, name, TWO_RANKS["a_rank_of_padding"], torch.float32)


@pytest.mark.parametrize("name", ["exact", "forward", "clipped_0.1", "mixed_0.2", "forward_top_k_student_bucket"])
def test_a_peaked_distribution_equals_torch(interpreted: RankPool, name: str) -> None:
    interpreted.run(compare_alone, name, Sizes(columns=45, size=43, spread=60.0))


def test_without_tokens_the_loss_and_gradients_are_zero(interpreted: RankPool) -> None:
    interpreted.run(compare_no_tokens)


@pytest.mark.parametrize(("columns", "offset"), [(1, 0.0), (2049, 300.0), (8195, -40.0)])
def test_statistics_equal_float64(interpreted: RankPool, columns: int, offset: float) -> None:
    interpreted.run(compare_statistics, columns, offset)


def test_cpu_uses_torch() -> None:
    assert isinstance(logits_memory("auto", 1, 1, torch.bfloat16, None, torch.device("cpu")), TorchLogits)


def test_kernels_for_float64_are_an_error() -> None:
    with pytest.raises(ValueError, match="float64"):
        run_head("log_prob_entropy_k2", Sizes(columns=5, size=5), torch.float64, "triton")


def test_unknown_kernels_are_an_error() -> None:
    def no_loss(tokens: HeadTokens, rows: slice) -> torch.Tensor:
        return tokens.log_probs

    hidden, weight, rows = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="kernels is 'cutlass'"):
        fused_head(hidden, weight, rows, rows, no_loss, VocabShard(None, 0, 3, 3), temperature=1.0, kernels="cutlass")


@pytest.mark.parametrize("sizes", TWO_RANKS.values(), ids=list(TWO_RANKS))
def test_known_tokens_of_the_teacher_give_what_its_logits_give(sizes: Sizes, interpreted: RankPool) -> None:
    interpreted.run(compare_known, sizes)

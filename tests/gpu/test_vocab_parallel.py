"""On a GPU: Triton's kernels agree with torch at real sizes and in rows beyond 32-bit offsets; the speed of the whole head."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from kdrl_mcore.vocab_parallel import ExactReverseKL, HeadTokens, TeacherInputs, VocabShard, fused_head
from kdrl_mcore.vocab_parallel.chunk import logits_memory
from tests.support.head_cases import HEADS, Sizes, assert_same, run_head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

VOCABULARY = 151936
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed")


def test_triton_is_chosen_on_cuda() -> None:
    from kdrl_mcore.vocab_parallel.triton_logits import TritonLogits

    assert isinstance(logits_memory("auto", 1, 16, torch.bfloat16, None, torch.device("cuda")), TritonLogits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_real_vocabulary_equals_torch(name: str, dtype: torch.dtype) -> None:
    sizes = Sizes(columns=VOCABULARY + 128, size=VOCABULARY, tokens=700, taught=300, hidden=512, chunk_tokens=256)
    results = [run_head(name, sizes, dtype, kernels, device="cuda") for kernels in ("triton", "torch")]
    assert_same(*results, ROUNDING[dtype])


def test_odd_columns_equal_torch() -> None:
    sizes = Sizes(columns=50259, size=50257, tokens=130, taught=77, hidden=64, chunk_tokens=64)
    results = [run_head("exact", sizes, torch.bfloat16, kernels, device="cuda") for kernels in ("triton", "torch")]
    assert_same(*results, ROUNDING[torch.bfloat16])


def test_a_chunk_beyond_32_bit_offsets() -> None:
    """The last rows of a chunk of more than 2^31 logits have the statistics and the derivative of a small one."""
    from kdrl_mcore.vocab_parallel import triton_kernels

    rows = 2**31 // VOCABULARY + 8
    z_CV = torch.zeros(rows, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    z_CV[-4:] = torch.randn(4, VOCABULARY, device="cuda")
    few_CV = z_CV[-4:].clone()
    assert torch.equal(triton_kernels.statistics(z_CV, None)[:, -4:], triton_kernels.statistics(few_CV, None))
    column_C = torch.full((rows,), VOCABULARY - 1, device="cuda")
    numbers_KC = torch.ones(4, rows, device="cuda")
    triton_kernels.differentiate(z_CV, None, column_C, numbers_KC)
    triton_kernels.differentiate(few_CV, None, column_C[-4:], numbers_KC[:, -4:].contiguous())
    assert torch.equal(z_CV[-4:], few_CV)


@pytest.mark.parametrize("exact", [False, True], ids=["log_prob_entropy_k2", "exact"])
def test_speed(exact: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the TFLOP/s of loss and gradients with each implementation, and of the logits' product; asserts only equality."""
    tokens, hidden = 8192, 4096
    generator = torch.Generator("cuda").manual_seed(6)

    def normal(rows: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, hidden, generator=generator, device="cuda") * scale).bfloat16()

    hidden_TH, weight_VH = normal(tokens).requires_grad_(), normal(VOCABULARY, hidden**-0.5).requires_grad_()
    teacher_TH, teacher_VH = normal(tokens), normal(VOCABULARY, hidden**-0.5)
    rows_T = torch.arange(tokens, device="cuda")
    targets_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator, device="cuda")
    shard = VocabShard(None, 0, VOCABULARY, VOCABULARY)

    teacher = TeacherInputs(teacher_TH, teacher_VH, ExactReverseKL()) if exact else None

    def token_loss(tokens: HeadTokens, _: slice) -> torch.Tensor:
        p = tokens.log_probs
        return (tokens.divergences - p if exact else 0.5 * (p + 12).square()) - 0.01 * tokens.entropies

    def run(kernels: Any) -> torch.Tensor:
        hidden_TH.grad = weight_VH.grad = None
        arguments = (hidden_TH, weight_VH, rows_T, targets_T, token_loss, shard)
        loss = fused_head(*arguments, temperature=1.0, teacher=teacher, kernels=kernels).loss
        loss.backward()
        return loss.detach()

    def seconds(function: object, repeats: int = 5) -> float:
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()  # type: ignore[operator]
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    losses = {kernels: run(kernels) for kernels in ("triton", "torch")}
    torch.testing.assert_close(losses["triton"], losses["torch"], rtol=1e-4, atol=0.0)
    product_flop = 2 * tokens * hidden * VOCABULARY
    buffer_CV = torch.empty(1024, VOCABULARY, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        product = seconds(lambda: torch.mm(hidden_TH[:1024], weight_VH.T, out=buffer_CV)) * tokens / 1024
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, T {tokens}, H {hidden}, V {VOCABULARY}, bfloat16")
        print(f"  logits' product alone: {product_flop / product / 1e12:.0f} TFLOP/s")
        for kernels in ("triton", "torch"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            rate = product_flop * (4 if exact else 3) / seconds(lambda kernels=kernels: run(kernels)) / 1e12
            extra = (torch.cuda.max_memory_allocated() - before) / 2**30
            print(f"  {kernels}: {rate:.0f} TFLOP/s, {extra:.1f} GiB above the inputs")

"""On one rank, every value and gradient is that of dense autograd, also at the edges of the input; what the pass may cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kdrl_mcore.vocab_parallel import (
    ExactReverseKL,
    HeadTokens,
    TeacherInputs,
    VocabShard,
    fused_head,
    head_log_probs,
    torch_logits,
)
from kdrl_mcore.vocab_parallel.chunk_logits import empty_rows
from kdrl_mcore.vocab_parallel.logits import local_top_k
from kdrl_mcore.vocab_parallel.top_k import SeparableDivergence
from tests.reference.output_head import EXACT_FORM, FORWARD_TOP_K, KINDS, TAILS, TOP_K, Problem, dense, make_problem
from tests.support import vocabulary
from tests.support.vocabulary import Layout, answer, assert_same

EXACT = {"rtol": 1e-10, "atol": 1e-11}
FUSED = [kind for kind in KINDS if kind != "logits"]
TAUGHT = [kind for kind in FUSED if kind != "head"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100, None])
@pytest.mark.parametrize("columns", [23, 24, 40])
def test_values_and_gradients_are_those_of_dense_autograd(kind: str, chunk_tokens: int | None, columns: int) -> None:
    layout, problem = Layout(columns=columns, chunk_tokens=chunk_tokens), make_problem()
    assert_same([answer(problem, kind, layout)], dense(problem, kind), layout, **EXACT)


@pytest.mark.parametrize("kind", TAUGHT)
@pytest.mark.parametrize("num_taught", [0, 1, 5, 8])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_only_the_first_rows_have_a_teacher(kind: str, num_taught: int, chunk_tokens: int) -> None:
    layout, problem = Layout(chunk_tokens=chunk_tokens), make_problem(num_taught=num_taught)
    one = answer(problem, kind, layout)
    assert_same([one], dense(problem, kind), layout, **EXACT)
    assert not one.divergence_T[num_taught:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_loss_and_zero_gradients(kind: str) -> None:
    one = answer(make_problem(0, 0), kind, Layout())
    assert one.loss == 0
    assert len(one.log_probs_T) == len(one.entropy_T) == len(one.divergence_T) == 0
    # The logits of no row have the gradient of no row; their sum is still zero.
    assert not one.d_hidden_SH.any()
    assert not one.d_weight_VH.any()


def test_the_loss_is_called_once_even_without_tokens() -> None:
    calls: list[int] = []

    def token_loss(tokens: HeadTokens, rows: slice) -> Tensor:
        calls.append(len(tokens.log_probs))
        return tokens.log_probs

    empty = torch.empty(0, dtype=torch.long)
    fused_head(torch.randn(4, 3), torch.randn(7, 3), empty, empty, token_loss, VocabShard(None, 0, 7, 7), temperature=1.0)
    assert calls == [0]


@pytest.mark.parametrize("kind", FUSED)
def test_tokens_that_the_loss_weighs_with_zero_change_nothing(kind: str) -> None:
    """The masked rows hold garbage, but finite garbage, like the padding of a batch."""
    problem = make_problem()
    factors_T4, hidden_SH = problem.factors_T4.clone(), problem.hidden_SH.clone()
    masked_T = torch.tensor([0, 3, 6, 8])
    factors_T4[masked_T] = 0.0
    hidden_SH[problem.rows_T[masked_T]] = 1e3
    kept_T = torch.tensor([1, 2, 4, 5, 7])
    alone = replace(
        problem,
        factors_T4=factors_T4[kept_T],
        **{name: getattr(problem, name)[kept_T] for name in ("rows_T", "targets_T", "sampler_log_probs_T")},
        teacher_hidden_DG=problem.teacher_hidden_DG[kept_T],
    )
    masked = answer(replace(problem, factors_T4=factors_T4, hidden_SH=hidden_SH), kind, Layout(chunk_tokens=4))
    expected = dense(alone, kind)
    torch.testing.assert_close(masked.loss, expected.loss, **EXACT)
    torch.testing.assert_close(masked.d_hidden_SH, expected.d_hidden_SH, **EXACT)
    torch.testing.assert_close(masked.d_weight_VH, expected.d_weight_VH, **EXACT)


@pytest.mark.parametrize("kind", [*TOP_K, *FORWARD_TOP_K])
def test_the_whole_vocabulary_as_the_set_is_the_exact_divergence(kind: str) -> None:
    problem = make_problem(top_k=23)
    # Nothing is outside: the bucket's term is of the order of the smallest number.
    assert_same([answer(problem, kind, Layout())], dense(problem, EXACT_FORM[kind]), Layout(), **EXACT)


@dataclass(frozen=True)
class ForwardKL(SeparableDivergence):
    def terms(self, p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.exp() * (log_q - log_p)


@pytest.mark.parametrize("tail", TAILS)
def test_another_divergence_is_one_class_with_one_method(tail: Any) -> None:
    p = make_problem()
    hidden_TH = p.hidden_SH[p.rows_T].requires_grad_()
    outputs = fused_head(
        hidden_TH,
        p.weight_VH,
        torch.arange(9),
        p.targets_T,
        lambda tokens, rows: tokens.divergences,
        VocabShard(None, 0, 23, 23),
        temperature=p.temperature,
        teacher=TeacherInputs(p.teacher_hidden_DG, p.teacher_weight_VG, ForwardKL(23, "teacher", tail)),
    )
    log_p_TV = (hidden_TH @ p.weight_VH.T / p.temperature).log_softmax(1)
    log_q_TV = (p.teacher_hidden_DG @ p.teacher_weight_VG.T / p.temperature).log_softmax(1)
    expected_T = (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(1)
    torch.testing.assert_close(outputs.divergences, expected_T.detach(), **EXACT)
    d_hidden_TH, expected_TH = (torch.autograd.grad(loss, hidden_TH)[0] for loss in (outputs.loss, expected_T.sum()))
    torch.testing.assert_close(d_hidden_TH, expected_TH, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_ten_thousand_neither_overflow_nor_lose_the_values(kind: str) -> None:
    problem = make_problem(scale=3e3)
    one, expected = answer(problem, kind, Layout()), dense(problem, kind)
    assert expected.log_probs_T.min() < -1e4
    # Gradients are sums of terms as large as the square of a logit times a weight, which may cancel.
    terms = (problem.hidden_SH[problem.rows_T] @ problem.weight_VH.T).abs().max() ** 2 * problem.weight_VH.abs().max()
    atol = 4 * torch.finfo(torch.float64).eps * float(terms)
    if kind in FORWARD_TOP_K and kind.endswith("bucket"):
        # The mass outside is 0 even in float64 and has no meaningful logarithm.
        assert torch.isfinite(one.d_weight_VH).all() and torch.isfinite(one.d_hidden_SH[problem.rows_T]).all()
    else:
        assert_same([one], expected, Layout(), rtol=1e-10, atol=atol)
    single = answer(problem.to(torch.float32), kind, Layout())
    for name in ("loss", "log_probs_T", "entropy_T", "divergence_T", "d_weight_VH"):
        assert torch.isfinite(getattr(single, name)).all(), name
    assert torch.isfinite(single.d_hidden_SH[problem.rows_T]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    problem = make_problem().to(torch.float32)
    assert_same([answer(problem, kind, Layout(chunk_tokens=4))], dense(problem, kind), Layout(), rtol=2e-5, atol=2e-5)


def test_zeros_stand_between_the_rows_of_logits() -> None:
    """A product with AMX reads them as factors of zero: memory may contain NaN from earlier use."""
    torch.use_deterministic_algorithms(True)  # uninitialised memory is full of NaN
    try:
        rows_CV = empty_rows(40, 27, torch.bfloat16, torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows_CV.stride() == (32, 1)
    assert not rows_CV.as_strided((40, 5), (32, 1), 27).any()
    assert (rows_CV.copy_(torch.ones(40, 27)) @ torch.ones(27, 16, dtype=torch.bfloat16) == 27).all()


@pytest.mark.parametrize("kind", FUSED)
def test_bfloat16_inputs_lose_only_the_rounding_of_the_logits(kind: str) -> None:
    """Logits are products in bfloat16, rounded by 2^-9 of their size and divided by the temperature in the product. A log-prob
    changes by at most twice the largest such error, an entropy by that times the range of log p."""
    problem = make_problem(scale=0.3).to(torch.bfloat16)
    one, expected = answer(problem, kind, Layout(chunk_tokens=4)), dense(problem, kind)
    wide = problem.to(torch.float64)
    largest = max(
        (hidden @ weight.T / wide.temperature).abs().max().item()
        for hidden, weight in (
            (wide.hidden_SH[wide.rows_T], wide.weight_VH),
            (wide.teacher_hidden_DG, wide.teacher_weight_VG),
        )
    )
    rounding = 2 * largest * 2.0**-9
    torch.testing.assert_close(one.log_probs_T.double(), expected.log_probs_T, rtol=0, atol=rounding)
    assert one.log_probs_T.dtype == torch.float32
    span = (expected.log_probs_T.abs().max() + 2 * largest).item()
    torch.testing.assert_close(one.entropy_T.double(), expected.entropy_T, rtol=0, atol=rounding * span)
    torch.testing.assert_close(one.divergence_T.double(), expected.divergence_T, rtol=0, atol=2 * rounding * span)
    assert one.d_weight_VH.dtype == one.d_hidden_SH.dtype == torch.bfloat16
    for name in ("d_hidden_SH", "d_weight_VH"):
        difference = (getattr(one, name).double() - getattr(expected, name)).norm()
        # The errors of the logits and the rounding of dL/dlogits and of the result, in the norm over all elements.
        assert difference <= (span * rounding + 2 * 2.0**-9) * getattr(expected, name).norm(), name


def test_the_weight_gradient_of_many_chunks_is_summed_in_float32() -> None:
    """A bfloat16 sum of a thousand equal terms would stop at the 256th: one more term is then less than its last digit."""
    rows, one = 1000, torch.ones(1, 1, dtype=torch.bfloat16)
    weight_VH = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    fused_head(
        one,
        weight_VH,
        torch.zeros(rows, dtype=torch.long),
        torch.zeros(rows, dtype=torch.long),
        lambda head, rows: -head.log_probs,
        VocabShard(None, 0, 2, 2),
        temperature=1.0,
        chunk_tokens=1,
    ).loss.backward()
    assert weight_VH.grad is not None and weight_VH.grad.tolist() == [[-rows / 2], [rows / 2]]


def counting() -> FlopCounterMode:
    """Counts matrix products; by default torch leaves out the in-place ones."""

    def product(sum_shape: list[int], a: list[int], b: list[int], **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


class _Recomputed(torch.autograd.Function):
    """The fused loss with as many backward passes as gradcheck needs: the gradients are computed once, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_SH: Tensor, weight_PH: Tensor, kind: str, problem: Problem, layout: Layout) -> Tensor:
        shard = vocabulary.shard_of(layout, 23)
        teacher_PG = vocabulary.own_part(problem, layout, shard)[2]
        with torch.enable_grad():
            leaves = hidden_SH.detach().requires_grad_(), weight_PH.detach().requires_grad_()
            loss = vocabulary.call(kind, problem, layout, shard, *leaves, teacher_PG)[0]
            ctx.gradients = torch.autograd.grad(loss, leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return *(outputs[0] * gradient for gradient in ctx.gradients), None, None, None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "top_k_unbiased"])
def test_gradcheck(kind: str) -> None:
    """top_k_unbiased is left out: its gradient is deliberately not that of its value."""
    problem, layout = make_problem(5, 3), Layout(columns=26, chunk_tokens=2)
    problem = replace(problem, hidden_SH=problem.hidden_SH.nan_to_num())
    hidden_SH, weight_PH, _ = vocabulary.own_part(problem, layout, vocabulary.shard_of(layout, 23))
    inputs = hidden_SH.requires_grad_(), weight_PH.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: _Recomputed.apply(*leaves, kind, problem, layout), inputs, fast_mode=True)


def test_log_probs_alone_are_those_of_the_loss() -> None:
    problem, layout = make_problem(), Layout(columns=24, chunk_tokens=4)
    shard = vocabulary.shard_of(layout, 23)
    hidden_SH, weight_PH, _ = vocabulary.own_part(problem, layout, shard)
    log_probs_T, entropy_T = head_log_probs(
        hidden_SH, weight_PH.requires_grad_(), problem.rows_T, problem.targets_T, shard, temperature=1.3, chunk_tokens=4
    )
    expected = dense(problem, "head")
    torch.testing.assert_close(log_probs_T, expected.log_probs_T, **EXACT)
    torch.testing.assert_close(entropy_T, expected.entropy_T, **EXACT)
    assert not log_probs_T.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_wanted_gradients_are_formed(frozen: str) -> None:
    problem, layout = make_problem(), Layout()
    shard = vocabulary.shard_of(layout, 23)
    hidden_SH, weight_VH, teacher_VG = vocabulary.own_part(problem, layout, shard)
    leaf = weight_VH.requires_grad_() if frozen == "hidden" else hidden_SH.requires_grad_()
    with counting() as flops:
        loss = vocabulary.call("head", problem, layout, shard, hidden_SH, weight_VH, teacher_VG)[0]
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = dense(problem, "head")
    torch.testing.assert_close(gradient, expected.d_weight_VH if frozen == "hidden" else expected.d_hidden_SH, **EXACT)
    assert flops.get_total_flops() == 4 * 9 * 6 * 23


def test_a_second_backward_pass_is_refused() -> None:
    problem, layout = make_problem(), Layout()
    shard = vocabulary.shard_of(layout, 23)
    hidden_SH, weight_VH, teacher_VG = vocabulary.own_part(problem, layout, shard)
    loss = vocabulary.call("head", problem, layout, shard, hidden_SH, weight_VH.requires_grad_(), teacher_VG)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up: run the forward pass again"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [-1, 23, 25])
def test_a_target_that_is_not_a_token_is_an_error(kind: str, target: int) -> None:
    problem = make_problem()
    problem.targets_T[4] = target
    with pytest.raises(ValueError, match="the vocabulary has the ids 0 to 22"):
        answer(problem, kind, Layout(columns=30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [-1, 23, 25])
def test_where_targets_cannot_be_checked_a_wrong_one_has_log_prob_nan(
    kind: str, target: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """23 and 25 are padding columns: they exist in the weight but not for the softmax."""
    monkeypatch.setattr(VocabShard, "check_targets", lambda self, targets_T: None)
    problem = make_problem()
    problem.targets_T[4] = target
    one = answer(problem, kind, Layout(columns=30))
    assert one.log_probs_T.isnan().tolist() == [False] * 4 + [True] + [False] * 4
    assert one.loss.isnan()


def test_equal_logits_are_taken_in_the_order_of_their_ids() -> None:
    logits_CV = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0, 1.0], [5.0] * 7, [0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 9.0]])
    assert local_top_k(logits_CV, 3).tolist() == [[1, 3, 0], [0, 1, 2], [3, 6, 0]]
    assert local_top_k(logits_CV, 9).tolist()[1] == list(range(7))
    assert local_top_k(logits_CV[:0], 3).shape == (0, 3)


class _Largest(TorchDispatchMode):
    """The largest number of elements in the storage of any operation's result, and how many storages of that size there
    were."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[int, int] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive.append(storage)  # so that no address is used twice
                self.blocks[storage.data_ptr()] = storage.nbytes() // value.element_size()
        return result


@pytest.mark.parametrize("kind", FUSED)
def test_no_tensor_of_all_tokens_times_the_vocabulary_ever_exists(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than a chunk's logits or dW, and there are only a few such blocks, whatever the number of chunks."""
    monkeypatch.setitem(torch_logits.BLOCK_BYTES, "cpu", 1)  # one row of temporary results
    num_tokens, size, chunk = 64, 4000, 4
    problem = replace(
        make_problem(),
        hidden_SH=torch.randn(num_tokens, 2),
        weight_VH=torch.randn(size, 2),
        teacher_hidden_DG=torch.randn(num_tokens, 2),
        teacher_weight_VG=torch.randn(size, 2),
        rows_T=torch.arange(num_tokens),
        targets_T=torch.randint(0, size, (num_tokens,)),
        sampler_log_probs_T=torch.full((num_tokens,), -3.0),
        factors_T4=torch.randn(num_tokens, 4),
    )
    layout = Layout(columns=size, chunk_tokens=chunk)
    shard = vocabulary.shard_of(layout, size)
    leaves = problem.hidden_SH.requires_grad_(), problem.weight_VH.requires_grad_()
    with _Largest() as seen:
        loss = vocabulary.call(kind, problem, layout, shard, *leaves, problem.teacher_weight_VG)[0]
        loss.backward()
    row = size + 16  # aligned
    large = sorted((numbers for numbers in seen.blocks.values() if numbers >= size * 2), reverse=True)
    assert large[0] <= chunk * row
    if "top_k" not in kind:
        # The same few buffers serve all sixteen chunks.
        assert len([numbers for numbers in large if numbers >= chunk * size]) <= 4


def test_the_matrix_products_are_all_the_work_there_is() -> None:
    """6 T H V with gradients, 2 T H V without, 2 D G V for the teacher of the first D rows; nothing for rows
    without a loss."""
    problem, layout = make_problem(num_taught=5), Layout(chunk_tokens=2)
    shard = vocabulary.shard_of(layout, 23)
    hidden_SH, weight_VH, teacher_VG = vocabulary.own_part(problem, layout, shard)

    def flops(kind: str, *leaves: Tensor) -> int:
        with counting() as counter:
            loss = vocabulary.call(kind, problem, layout, shard, *leaves, teacher_VG)[0]
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops()

    bare = 2 * 9 * 6 * 23
    assert flops("head", hidden_SH, weight_VH) == bare
    assert flops("exact", hidden_SH, weight_VH) == bare + 2 * 5 * 5 * 23
    hidden_SH.requires_grad_()
    weight_VH.requires_grad_()
    for kind in TAUGHT:
        assert flops(kind, hidden_SH, weight_VH) == 3 * bare + 2 * 5 * 5 * 23, kind
    assert flops("head", hidden_SH, weight_VH) == 3 * bare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VH": torch.zeros(23, 7, dtype=torch.float64)}, "do not fit"),
        ({"hidden_SH": torch.zeros(16, 6)}, "cast one of them"),
        ({"rows_T": torch.arange(4)}, "vectors of one length"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be positive"),
        ({"temperature": float("nan")}, "it must be positive"),
        ({"teacher_hidden_DG": torch.zeros(10, 5, dtype=torch.float64)}, "at most 9"),
        ({"teacher_hidden_DG": torch.zeros(9, 4, dtype=torch.float64)}, "do not fit"),
        ({"teacher_weight_VG": torch.zeros(22, 5, dtype=torch.float64)}, "fewer than the student's 23"),
    ],
)
def test_what_does_not_fit_is_an_error(change: dict[str, Any], message: str) -> None:
    p = replace(make_problem(), **change)
    with pytest.raises(ValueError, match=message):
        fused_head(
            p.hidden_SH,
            p.weight_VH,
            p.rows_T,
            p.targets_T,
            lambda tokens, rows: tokens.log_probs,
            VocabShard(None, 0, 23, 23),
            temperature=p.temperature,
            teacher=TeacherInputs(p.teacher_hidden_DG, p.teacher_weight_VG, ExactReverseKL()),
        )


def test_options_and_losses_that_make_no_sense_are_errors() -> None:
    problem = make_problem()
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        answer(problem, "head", Layout(chunk_tokens=0))
    with pytest.raises(ValueError, match="tail is 'rest'"):
        answer(problem, "top_k student rest", Layout())
    with pytest.raises(ValueError, match="support is 'both'"):
        answer(problem, "top_k both bucket", Layout())
    for top_k in (0, 24):
        with pytest.raises(ValueError, match=f"k is {top_k}: it must be between 1 and the vocabulary's 23"):
            answer(replace(problem, top_k=top_k), "top_k_unbiased", Layout())
    with pytest.raises(ValueError, match="return each token's own loss"):
        fused_head(
            problem.hidden_SH,
            problem.weight_VH,
            problem.rows_T,
            problem.targets_T,
            lambda tokens, rows: tokens.log_probs.sum(),
            VocabShard(None, 0, 23, 23),
            temperature=1.0,
        )

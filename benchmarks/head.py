"""Ways to compute loss and gradients of an output head, each in separate processes so that its memory can be measured.

T tokens, C rows of a chunk, H hidden size (of student and teacher), V vocabulary columns of one rank.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.resident import peak_resident_bytes, resident_bytes, restart_peak
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.vocab_parallel import (
    ExactForwardKL,
    ExactReverseKL,
    HeadTokens,
    JensenShannon,
    TeacherInputs,
    TopKForwardKL,
    TopKJensenShannon,
    TopKReverseKL,
    VocabShard,
    fused_head,
)
from kdrl_mcore.vocab_parallel.collectives import gather_columns
from kdrl_mcore.vocab_parallel.divergence import Divergence
from kdrl_mcore.vocab_parallel.engine import default_chunk_tokens

WARM_UP_TOKENS = 16
TIMEOUT = 1800.0  # seconds for one command
CLIP, BETA, ENTROPY_WEIGHT = 0.2, 0.1, 0.01
TOP_K = 50
LEAST_TEACHER_ENTROPY = 0.8

DIVERGENCES: dict[str, Divergence | None] = {
    "k2": None,
    "exact": ExactReverseKL(),
    "forward": ExactForwardKL(),
    "jensen_shannon": JensenShannon(0.5),
    "top_k_bucket": TopKForwardKL(TOP_K, "teacher", "bucket"),
    "top_k_corrected": TopKReverseKL(TOP_K, "teacher", "corrected"),
    "top_k_jsd": TopKJensenShannon(TOP_K, "teacher", "bucket", 0.5),
    "eopd": TopKForwardKL(TOP_K, "teacher", "truncate"),
}
"""The divergence in the loss of each problem; None for k2, for which the teacher's log-probs are given. `eopd` needs the
teacher's entropy too (arXiv 2603.07079)."""


@dataclass(frozen=True)
class Problem:
    """The problem: the loss of `tokens` tokens over `vocab` columns that `tp` ranks share, and its gradients.

    Attributes:
        estimator: one of `DIVERGENCES`, in a loss with GRPO and the entropy.
        threads: CPU threads of one rank.
    """

    tokens: int
    hidden: int
    vocab: int
    tp: int
    dtype: str
    estimator: str
    device: str
    threads: int

    @property
    def flop(self) -> int:
        """The FLOP of the bare matrix products on one rank."""
        return (6 if DIVERGENCES[self.estimator] is None else 8) * self.tokens * self.hidden * (self.vocab // self.tp)


@dataclass
class Inputs:
    """The tensors of one rank; the first two get gradients."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    advantages_T: Tensor
    teacher_log_probs_T: Tensor
    teacher: TeacherInputs | None
    shard: VocabShard

    def first(self, tokens: int) -> Inputs:
        """The inputs of the first `tokens` tokens."""
        return Inputs(
            self.hidden_TH.detach()[:tokens].clone().requires_grad_(),
            self.weight_VH,
            self.targets_T[:tokens],
            self.advantages_T[:tokens],
            self.teacher_log_probs_T[:tokens],
            None if self.teacher is None else self.teacher.of_rows(slice(tokens)),
            self.shard,
        )

    def loss_C(self, tokens: HeadTokens, rows: slice) -> Tensor:
        """The loss of each token: clipped surrogate, entropy bonus, and k2 or the divergence."""
        log_probs_C, divergence_C = tokens.log_probs, tokens.divergences
        ratio_C = (log_probs_C - log_probs_C.detach()).exp()
        advantages_C = self.advantages_T[rows]
        surrogate_C = torch.minimum(ratio_C * advantages_C, ratio_C.clamp(1 - CLIP, 1 + CLIP) * advantages_C)
        if self.teacher is None:
            divergence_C = 0.5 * (self.teacher_log_probs_T[rows] - log_probs_C).square()
        elif tokens.teacher_entropies is not None:
            divergence_C = divergence_C * (tokens.teacher_entropies > LEAST_TEACHER_ENTROPY)
        return -surrogate_C + BETA * divergence_C - ENTROPY_WEIGHT * tokens.entropies


def make_inputs(problem: Problem, rank: int, group: dist.ProcessGroup | None) -> Inputs:
    """The same seeded inputs for every variant: hidden states equal on every rank, and logits of unit variance."""
    dtype, columns = getattr(torch, problem.dtype), problem.vocab // problem.tp
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + rank)

    def normal(rows: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, problem.hidden, generator=generator).mul_(scale).to(problem.device, dtype)

    divergence = DIVERGENCES[problem.estimator]
    return Inputs(
        normal(problem.tokens, shared).requires_grad_(),
        normal(columns, own, problem.hidden**-0.5).requires_grad_(),
        torch.randint(0, problem.vocab, (problem.tokens,), generator=shared).to(problem.device),
        torch.randn(problem.tokens, generator=shared).to(problem.device),
        torch.randn(problem.tokens, generator=shared).sub_(12).to(problem.device),
        None
        if divergence is None
        else TeacherInputs(
            normal(problem.tokens, shared),
            normal(columns, own, problem.hidden**-0.5),
            divergence,
            with_entropy=problem.estimator == "eopd",
        ),
        VocabShard(group, rank * columns, (rank + 1) * columns, problem.vocab),
    )


class _ToRanks(torch.autograd.Function):
    """Passes a value to the columns of every rank: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        if ctx.shard.ranks > 1:
            dist.all_reduce(gradient, group=ctx.shard.group)
        return gradient, None


class _SumOfRanks(torch.autograd.Function):
    """Sums the ranks' parts: as every rank continues with the same sum, each part's gradient is that of the sum."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, shard: VocabShard) -> Tensor:
        total = value.clone()
        if shard.ranks > 1:
            dist.all_reduce(total, group=shard.group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _log_softmax(hidden_CH: Tensor, weight_VH: Tensor, shard: VocabShard) -> Tensor:
    logits_CV = (hidden_CH @ weight_VH.T).float()
    if shard.ranks == 1:
        return logits_CV.log_softmax(dim=1)
    peak_C = logits_CV.detach().amax(dim=1)
    dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=shard.group)
    total_C = _SumOfRanks.apply((logits_CV - peak_C[:, None]).exp().sum(dim=1), shard)
    # The sum goes back to the columns of each rank.
    return logits_CV - _ToRanks.apply(peak_C + total_C.log(), shard)[:, None]


def _plain_loss(inputs: Inputs, hidden_CH: Tensor, weight_VH: Tensor, start: int) -> Tensor:
    """The loss of some rows for autograd, with the logits and everything computed from them in float32."""
    rows, shard = slice(start, start + len(hidden_CH)), inputs.shard
    log_p_CV = _log_softmax(_ToRanks.apply(hidden_CH, shard), weight_VH, shard)
    p_CV = log_p_CV.exp()
    own_C, column_C = shard.locate(inputs.targets_T[rows])
    log_probs_C = _SumOfRanks.apply(torch.where(own_C, log_p_CV.gather(1, column_C[:, None])[:, 0], 0.0), shard)
    entropy_C = -_SumOfRanks.apply((p_CV * log_p_CV).sum(dim=1), shard)
    divergence_C = teacher_log_probs_C = torch.zeros_like(log_probs_C)
    teacher_entropy_C = None
    if inputs.teacher is not None:
        with torch.no_grad():
            log_q_CV = _log_softmax(inputs.teacher.hidden_DG[rows], inputs.teacher.weight_VG, shard)
        if inputs.teacher.with_entropy:
            teacher_entropy_C = -_SumOfRanks.apply((log_q_CV.exp() * log_q_CV).sum(dim=1), shard)
        divergence_C = _plain_divergence(inputs.teacher.divergence, log_p_CV, p_CV, log_q_CV, shard)
    tokens = HeadTokens(log_probs_C, entropy_C, divergence_C, teacher_log_probs_C, teacher_entropy_C)
    return inputs.loss_C(tokens, rows).sum()


def _plain_divergence(form: Divergence, log_p_CV: Tensor, p_CV: Tensor, log_q_CV: Tensor, shard: VocabShard) -> Tensor:
    """The divergence [C] from this rank's columns, as one would write it for autograd."""
    if isinstance(form, ExactReverseKL):
        return _SumOfRanks.apply((p_CV * (log_p_CV - log_q_CV)).sum(dim=1), shard)
    if isinstance(form, ExactForwardKL):
        return _SumOfRanks.apply((log_q_CV.exp() * (log_q_CV - log_p_CV)).sum(dim=1), shard)
    if isinstance(form, JensenShannon):
        log_m_CV = torch.logaddexp(log_q_CV + math.log(form.beta), log_p_CV + math.log1p(-form.beta))
        terms_CV = form.beta * log_q_CV.exp() * (log_q_CV - log_m_CV) + (1 - form.beta) * p_CV * (log_p_CV - log_m_CV)
        return _SumOfRanks.apply(terms_CV.sum(dim=1), shard)
    assert isinstance(form, TopKForwardKL | TopKJensenShannon | TopKReverseKL) and form.support == "teacher"
    largest_CK = gather_columns(log_q_CV.topk(form.k, dim=1).values, shard)
    inside_CV = log_q_CV >= largest_CK.topk(form.k, dim=1).values[:, -1:]
    row_N, column_N = inside_CV.nonzero(as_tuple=True)
    log_p_N, log_q_N = log_p_CV[row_N, column_N], log_q_CV[row_N, column_N]
    terms_N = form.terms(log_p_N.exp(), log_p_N, log_q_N)
    inside_C = _SumOfRanks.apply(log_p_CV.new_zeros(len(log_p_CV)).index_add(0, row_N, terms_N), shard)
    if form.tail != "bucket":
        return inside_C
    p_out_C, q_out_C = (
        _SumOfRanks.apply(mass_CV.masked_fill(inside_CV, 0.0).sum(dim=1), shard) for mass_CV in (p_CV, log_q_CV.exp())
    )
    return inside_C + form.terms(p_out_C, p_out_C.log(), q_out_C.log())


def materialised(inputs: Inputs) -> Tensor:
    """All logits at once, in float32, differentiated by autograd."""
    loss = _plain_loss(inputs, inputs.hidden_TH, inputs.weight_VH, 0)
    loss.backward()
    return loss.detach()


def recomputed(inputs: Inputs) -> Tensor:
    """Chunks of the same size as in `ours`, each recomputed for its gradient."""
    size = default_chunk_tokens(inputs.shard, inputs.hidden_TH.device)
    parts = [
        checkpoint(_plain_loss, inputs, inputs.hidden_TH[start : start + size], inputs.weight_VH, start, use_reentrant=False)
        for start in range(0, len(inputs.hidden_TH), size)
    ]
    loss = torch.stack(parts).sum()
    loss.backward()
    return loss.detach()


def ours(inputs: Inputs) -> Tensor:
    """The fused head."""
    loss = fused_head(
        inputs.hidden_TH,
        inputs.weight_VH,
        torch.arange(len(inputs.targets_T), device=inputs.targets_T.device),
        inputs.targets_T,
        inputs.loss_C,
        inputs.shard,
        temperature=1.0,
        teacher=inputs.teacher,
    ).loss
    loss.backward()
    return loss.detach()


@torch.no_grad()
def bare_products(inputs: Inputs) -> None:
    """The lower bound: only the matrix products for logits, dX and dW (and the teacher's logits), in the same chunks."""
    hidden_TH, weight_VH = inputs.hidden_TH, inputs.weight_VH
    size = min(len(hidden_TH), default_chunk_tokens(inputs.shard, hidden_TH.device))
    buffer_CV = hidden_TH.new_empty(size, len(weight_VH))
    d_hidden_TH, d_weight_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
    for start in range(0, len(hidden_TH), size):
        hidden_CH = hidden_TH[start : start + size]
        logits_CV = buffer_CV[: len(hidden_CH)]
        if inputs.teacher is not None:
            torch.mm(inputs.teacher.hidden_DG[start : start + size], inputs.teacher.weight_VG.T, out=logits_CV)
        torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
        torch.mm(logits_CV, weight_VH, out=d_hidden_TH[start : start + size])
        d_weight_VH.addmm_(logits_CV.T, hidden_CH)


VARIANTS: dict[str, Callable[[Inputs], Tensor | None]] = {
    "materialised": materialised,
    "recomputed": recomputed,
    "ours": ours,
    "bare products": bare_products,
}


@dataclass
class Reference:
    """The loss and gradients of the first variant on one rank, in shared memory."""

    loss: Tensor
    d_hidden_TH: Tensor
    d_weight_VH: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Reference:
        """Allocate the memory for one rank."""
        shapes = (1,), (problem.tokens, problem.hidden), (problem.vocab // problem.tp, problem.hidden)
        return cls(*(torch.zeros(shape).share_memory_() for shape in shapes))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, dX, dW."""
        return self.loss, self.d_hidden_TH, self.d_weight_VH


class Ranks:
    """The processes of one variant, one per tensor-parallel rank, which wait for commands."""

    def __init__(self, variant: str, problem: Problem, references: list[Reference], folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._variant, self._members = variant, []
        for rank in range(problem.tp):
            connection, theirs = context.Pipe()
            arguments = (variant, problem, rank, folder / variant, references[rank], theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, connection))

    def ask(self, command: str) -> list[dict[str, float]]:
        """Run a command on every rank and return the answers.

        Raises:
            KdrlError: a rank failed or died.
        """
        for _, connection in self._members:
            connection.send(command)
        answers: list[dict[str, float]] = []
        for rank, (process, connection) in enumerate(self._members):
            try:
                answer = connection.recv() if connection.poll(TIMEOUT) else f"no answer in {TIMEOUT:g} s"
            except (EOFError, ConnectionError):
                process.join(5)
                answer = f"its process ended with code {process.exitcode} (out of memory?)"
            if isinstance(answer, str):
                raise KdrlError(f"{self._variant}, rank {rank}, {command}: {answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process, _ in self._members:
            process.kill()
            process.join()


def _serve(variant: str, problem: Problem, rank: int, store: Path, reference: Reference, connection: Connection) -> None:
    """The main function of one rank. Commands: `first`, the untimed first run, answers `extra_bytes` at its peak and the
    `difference` from the reference; `publish` is the same, but its results become the reference; `time` answers the wall-clock
    `seconds` and `cpu_seconds` of a run."""
    try:
        torch.set_num_threads(problem.threads)
        if problem.device == "cuda":
            torch.cuda.set_device(rank)
        if problem.tp > 1:
            backend = "nccl" if problem.device == "cuda" else "gloo"
            address = f"file://{store}"
            dist.init_process_group(backend, address, timedelta(seconds=TIMEOUT), world_size=problem.tp, rank=rank)
        inputs = make_inputs(problem, rank, dist.group.WORLD if problem.tp > 1 else None)
        commands = {
            "publish": partial(_first, variant, inputs, reference, publish=True),
            "first": partial(_first, variant, inputs, reference, publish=False),
            "time": partial(_time, partial(VARIANTS[variant], inputs), inputs),
        }
        while True:
            command = connection.recv()
            connection.send(commands[command]())
            inputs.hidden_TH.grad = inputs.weight_VH.grad = None
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _first(variant: str, inputs: Inputs, reference: Reference, *, publish: bool) -> dict[str, float]:
    """Run a variant for the first time. A run with few tokens comes before, so that loaded code and thread pools do not count
    as its memory."""
    VARIANTS[variant](inputs.first(WARM_UP_TOKENS))
    inputs.weight_VH.grad = None
    gc.collect()
    extra_bytes, loss = _extra_memory(partial(VARIANTS[variant], inputs), inputs)
    if loss is None:
        return {"extra_bytes": extra_bytes}
    assert inputs.hidden_TH.grad is not None and inputs.weight_VH.grad is not None
    results = loss.reshape(1), inputs.hidden_TH.grad, inputs.weight_VH.grad
    if publish:
        for kept, value in zip(reference.tensors(), results, strict=True):
            kept.copy_(value)
        return {"extra_bytes": extra_bytes}
    pairs = [(value.float().cpu(), kept) for value, kept in zip(results, reference.tensors(), strict=True)]
    difference = max(float((value - kept).abs().max() / kept.abs().max()) for value, kept in pairs)
    return {"extra_bytes": extra_bytes, "difference": difference}


def _extra_memory(run: Callable[[], Tensor | None], inputs: Inputs) -> tuple[float, Tensor | None]:
    """(bytes at the peak of the run above those before it, the result of the run); on CPU, bytes of the resident set."""
    if inputs.hidden_TH.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = run()
        return float(torch.cuda.max_memory_allocated() - before), loss
    restart_peak()
    before = resident_bytes()
    loss = run()
    return float(peak_resident_bytes() - before), loss


def _time(run: Callable[[], Any], inputs: Inputs) -> dict[str, float]:
    if inputs.shard.ranks > 1:
        dist.barrier()
    _synchronize(inputs)
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    _synchronize(inputs)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def _synchronize(inputs: Inputs) -> None:
    if inputs.hidden_TH.is_cuda:
        torch.cuda.synchronize()

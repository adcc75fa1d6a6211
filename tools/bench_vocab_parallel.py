"""Ways to get loss and gradients from an output head, each in processes of its own so that its memory is its own.

T tokens, C rows of a chunk, H hidden (of student and teacher), V vocabulary columns of one rank.
"""

from __future__ import annotations

import gc
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

from kdrl_mcore.errors import KdrlError
from kdrl_mcore.vocab_parallel import VocabShard, fused_exact_reverse_kl, fused_head
from kdrl_mcore.vocab_parallel.engine import default_chunk_tokens
from tools.resident import peak_resident_bytes, resident_bytes, restart_peak

WARM_UP_TOKENS = 16
TIMEOUT = 1800.0  # seconds for one command
CLIP, BETA, ENTROPY_WEIGHT = 0.2, 0.1, 0.01


@dataclass(frozen=True)
class Problem:
    """What is computed: the loss of `tokens` tokens over `vocab` columns that `tp` ranks share, and its gradients.

    Attributes:
        estimator: `k2` (log-prob, entropy, GRPO and k2) or `exact` (exact reverse KL besides GRPO and entropy).
        threads: of one rank.
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
        """Of the bare matrix products, on one rank."""
        return (8 if self.estimator == "exact" else 6) * self.tokens * self.hidden * (self.vocab // self.tp)


@dataclass
class Inputs:
    """One rank's tensors; the first two get gradients."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    advantages_T: Tensor
    teacher_log_probs_T: Tensor
    teacher_hidden_TH: Tensor | None
    teacher_weight_VH: Tensor | None
    shard: VocabShard

    def first(self, tokens: int) -> Inputs:
        """The problem with fewer tokens."""
        teacher_TH = None if self.teacher_hidden_TH is None else self.teacher_hidden_TH[:tokens]
        return Inputs(
            self.hidden_TH.detach()[:tokens].clone().requires_grad_(),
            self.weight_VH,
            self.targets_T[:tokens],
            self.advantages_T[:tokens],
            self.teacher_log_probs_T[:tokens],
            teacher_TH,
            self.teacher_weight_VH,
            self.shard,
        )

    def loss_C(self, log_probs_C: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> Tensor:
        """Clipped surrogate, entropy bonus and k2 or the exact divergence: each token's loss."""
        ratio_C = (log_probs_C - log_probs_C.detach()).exp()
        advantages_C = self.advantages_T[rows]
        surrogate_C = torch.minimum(ratio_C * advantages_C, ratio_C.clamp(1 - CLIP, 1 + CLIP) * advantages_C)
        if divergence_C is None:
            divergence_C = 0.5 * (self.teacher_log_probs_T[rows] - log_probs_C).square()
        return -surrogate_C + BETA * divergence_C - ENTROPY_WEIGHT * entropy_C


def make_inputs(problem: Problem, rank: int, group: dist.ProcessGroup | None) -> Inputs:
    """The same problem for every variant: seeded, hidden states alike on every rank, logits of unit variance."""
    dtype, columns = getattr(torch, problem.dtype), problem.vocab // problem.tp
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2 + rank)

    def normal(rows: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, problem.hidden, generator=generator).mul_(scale).to(problem.device, dtype)

    exact = problem.estimator == "exact"
    return Inputs(
        normal(problem.tokens, shared).requires_grad_(),
        normal(columns, own, problem.hidden**-0.5).requires_grad_(),
        torch.randint(0, problem.vocab, (problem.tokens,), generator=shared).to(problem.device),
        torch.randn(problem.tokens, generator=shared).to(problem.device),
        torch.randn(problem.tokens, generator=shared).sub_(12).to(problem.device),
        normal(problem.tokens, shared) if exact else None,
        normal(columns, own, problem.hidden**-0.5) if exact else None,
        VocabShard(group, rank * columns, (rank + 1) * columns, problem.vocab),
    )


class _ToRanks(torch.autograd.Function):
    """What every rank's columns are computed from: its gradient is the sum of theirs."""

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
    """The sum of the ranks' parts: as every rank goes on alike, each part's gradient is the sum's."""

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
    # The sum goes back to the ranks' own columns.
    return logits_CV - _ToRanks.apply(peak_C + total_C.log(), shard)[:, None]


def _plain_loss(inputs: Inputs, hidden_CH: Tensor, weight_VH: Tensor, start: int) -> Tensor:
    """The loss of some rows as autograd has it, with the logits and what is made of them in float32."""
    rows, shard = slice(start, start + len(hidden_CH)), inputs.shard
    log_p_CV = _log_softmax(_ToRanks.apply(hidden_CH, shard), weight_VH, shard)
    p_CV = log_p_CV.exp()
    own_C, column_C = shard.locate(inputs.targets_T[rows])
    log_probs_C = _SumOfRanks.apply(torch.where(own_C, log_p_CV.gather(1, column_C[:, None])[:, 0], 0.0), shard)
    entropy_C = -_SumOfRanks.apply((p_CV * log_p_CV).sum(dim=1), shard)
    divergence_C = None
    if inputs.teacher_hidden_TH is not None and inputs.teacher_weight_VH is not None:
        with torch.no_grad():
            log_q_CV = _log_softmax(inputs.teacher_hidden_TH[rows], inputs.teacher_weight_VH, shard)
        divergence_C = _SumOfRanks.apply((p_CV * (log_p_CV - log_q_CV)).sum(dim=1), shard)
    return inputs.loss_C(log_probs_C, entropy_C, divergence_C, rows).sum()


def materialised(inputs: Inputs) -> Tensor:
    """All logits at once, in float32, differentiated by autograd."""
    loss = _plain_loss(inputs, inputs.hidden_TH, inputs.weight_VH, 0)
    loss.backward()
    return loss.detach()


def recomputed(inputs: Inputs) -> Tensor:
    """In chunks of the size that ours has, each computed again for its gradient."""
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
    rows_T = torch.arange(len(inputs.targets_T), device=inputs.targets_T.device)
    if inputs.teacher_hidden_TH is not None and inputs.teacher_weight_VH is not None:
        loss, *_ = fused_exact_reverse_kl(
            inputs.hidden_TH,
            inputs.weight_VH,
            inputs.teacher_hidden_TH,
            inputs.teacher_weight_VH,
            rows_T,
            inputs.targets_T,
            inputs.loss_C,
            inputs.shard,
            temperature=1.0,
        )
    else:

        def token_loss(log_probs_C: Tensor, entropy_C: Tensor, rows: slice) -> Tensor:
            return inputs.loss_C(log_probs_C, entropy_C, None, rows)

        loss, *_ = fused_head(
            inputs.hidden_TH, inputs.weight_VH, rows_T, inputs.targets_T, token_loss, inputs.shard, temperature=1.0
        )
    loss.backward()
    return loss.detach()


@torch.no_grad()
def bare_products(inputs: Inputs) -> None:
    """The floor: logits, dX and dW (and the teacher's logits) as matrix products and nothing else, in the same chunks."""
    hidden_TH, weight_VH = inputs.hidden_TH, inputs.weight_VH
    size = min(len(hidden_TH), default_chunk_tokens(inputs.shard, hidden_TH.device))
    buffer_CV = hidden_TH.new_empty(size, len(weight_VH))
    d_hidden_TH, d_weight_VH = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
    for start in range(0, len(hidden_TH), size):
        hidden_CH = hidden_TH[start : start + size]
        logits_CV = buffer_CV[: len(hidden_CH)]
        if inputs.teacher_hidden_TH is not None and inputs.teacher_weight_VH is not None:
            torch.mm(inputs.teacher_hidden_TH[start : start + size], inputs.teacher_weight_VH.T, out=logits_CV)
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
    """The first variant's loss and gradients on one rank, in memory that the processes share."""

    loss: Tensor
    d_hidden_TH: Tensor
    d_weight_VH: Tensor

    @classmethod
    def empty(cls, problem: Problem) -> Reference:
        """Room for one rank's."""
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
        """Run a command on every rank; their answers.

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
    """The life of one rank. Commands: `first`, the untimed first run: `extra_bytes` at its peak, and `difference` to the
    reference; `publish`, the same, and its results become the reference; `time`: `seconds` that passed and `cpu_seconds`."""
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
    """Code and thread pools are warmed by a run with few tokens, so that they do not count as memory."""
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
    """(bytes at the run's peak above what was there before, the run's result). CPU: of the resident set."""
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

"""A teacher on servers: some ranks ask for the scores, and the scores reach the ranks that need them.

N responses, G the width of a row of states (`ServedScores.states`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config.derived import DISTRIBUTION, ENTROPIES, LOG_PROBS
from kdrl_mcore.errors import TeacherError
from kdrl_mcore.model.gpt import LanguageModel
from kdrl_mcore.parallel.collect import gather_from_replicas, gather_objects
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.resilience.waiting import waits_for_others
from kdrl_mcore.teacher.hidden_states import HiddenStates
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.servers import Expected, ScoringServers, ServedScores
from kdrl_mcore.teacher.source import as_read
from kdrl_mcore.types import Rollout

logger = logging.getLogger(__name__)

BEAT_SECONDS = 60.0
"""How often the asking ranks tell the others that they still wait: a collective that waits longer than the process group's
time-out would end the job."""
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Rows:
    """The rows of states that a teacher's servers give for each token.

    Attributes:
        width: G.
        dtype: the type in which they are kept.
    """

    width: int
    dtype: torch.dtype


class ServedTeacher:
    """Scores given tokens by asking servers. The leaders of the student's replicas ask, each for a share of the responses.

    Attributes:
        rows: the states that the loss needs; None if it needs only values.
    """

    chunks: Sequence[LanguageModel] = ()

    def __init__(
        self,
        connect: Callable[[int], ScoringServers],
        groups: ModelGroups,
        concurrency: int,
        rows: Rows | None,
        *,
        name: str | None = None,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        connect: makes a client with so many requests in flight on each server; called on the ranks that ask.
        groups: the student's.
        concurrency: requests in flight on each server, of all ranks.
        rows: see the class.
        name: which of `Rollout.teacher_prompts` the teacher reads; None for the student's prompts.
        on_progress: called on every rank while servers make progress.
        """
        layout = groups.layout
        leaders = [
            layout.rank(pipeline=layout.pipeline - 1, data=data, context=context)
            for data in range(layout.data)
            for context in range(layout.context)
        ]
        self._askers = leaders[:concurrency]
        asks = dist.get_rank() in self._askers
        self._servers = connect(max(1, concurrency // len(self._askers))) if asks else None
        self._groups, self.rows, self._name, self._on_progress = groups, rows, name, on_progress
        self._thread = ThreadPoolExecutor(1) if asks else None

    def check(self, expected: Expected) -> None:
        """Check that the servers are the expected teacher, from every rank that asks. Collective over the world.

        Raises:
            TeacherError: on all ranks: they are not, or cannot be reached from a rank.
        """
        error, described = None, ""
        if self._servers is not None:
            try:
                described = self._servers.check(expected)
            except TeacherError as failure:
                error = str(failure)
        _raise_first(gather_objects(error))
        if dist.get_rank() == self._askers[0]:
            logger.info("the teacher's servers: %s", described)

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`. Collectives: an all-gather over the world for every `BEAT_SECONDS` of waiting, and where values
        are wanted `gather_from_replicas`.

        Raises:
            TeacherError: on all ranks: a request failed on one of them. It names the prompt, the server and the reason.
        """
        read = as_read(rollouts, self._name)
        shares = _deal(read, len(self._askers))
        owner = {index: rank for rank, share in zip(self._askers, shares, strict=True) for index in share}
        mine = [index for index, rank in owner.items() if rank == dist.get_rank()]
        scores = dict(zip(mine, self._ask([read[index] for index in mine], wanted), strict=True))
        values = dict[int, ServedScores]()
        if LOG_PROBS in wanted:
            found = [(index, ServedScores(each.log_probs, None, each.entropies)) for index, each in scores.items()]
            values = dict(gather_from_replicas(self._groups, found))
        hidden = None
        if DISTRIBUTION in wanted:
            assert self.rows is not None
            local = {index: _rows(each, self.rows.dtype) for index, each in scores.items()}
            hidden = HiddenStates(self.rows.width, self.rows.dtype, owner, local)
        entropies = {index: each.entropies for index, each in values.items() if ENTROPIES in wanted}
        return TeacherScores(
            scored={index: len(each.response_token_ids) for index, each in read.items()},
            log_probs={index: each.log_probs for index, each in values.items() if each.log_probs is not None},
            entropies={index: each for index, each in entropies.items() if each is not None},
            hidden=hidden,
        )

    def _ask(self, rollouts: Sequence[Rollout], wanted: frozenset[str]) -> list[ServedScores]:
        """The scores of this rank's share of the responses, once every rank has its own. Collective over the world."""
        answers, seen, job = [0], 0, None

        def count() -> None:
            answers[0] += 1

        if self._servers is not None and self._thread is not None and rollouts:
            job = self._thread.submit(self._servers.score, rollouts, wanted, count)
        while True:
            finished = job is None or _wait(job, BEAT_SECONDS)
            failure = job.exception() if finished and job is not None else None
            error = None if failure is None else str(failure) or type(failure).__name__
            everywhere = gather_objects((finished, answers[0], error))
            if failure is not None and not isinstance(failure, TeacherError):
                raise failure  # with its traceback; the other ranks raise below
            _raise_first([text for _, _, text in everywhere])
            total = sum(number for _, number, _ in everywhere)
            if total > seen:
                seen = total
                self._on_progress()
            if all(done for done, _, _ in everywhere):
                return [] if job is None else job.result()

    def close(self) -> None:
        """Close the connections; requests under way fail. Not collective."""
        if self._servers is not None and self._thread is not None:
            self._servers.close()
            self._thread.shutdown(wait=False, cancel_futures=True)


@waits_for_others
def _wait(job: Future[list[ServedScores]], seconds: float) -> bool:
    """Wait for the servers' answers, at most so long; whether they are all there, or one failed."""
    deadline = time.monotonic() + seconds
    while not job.done() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return job.done()


def _raise_first(errors: Sequence[str | None]) -> None:
    failed = [error for error in errors if error is not None]
    if failed:
        raise TeacherError(failed[0])


def _rows(scores: ServedScores, dtype: torch.dtype) -> Tensor:
    assert scores.states is not None
    return scores.states.to(dtype)


def _deal(rollouts: Mapping[int, Rollout], count: int) -> list[list[int]]:
    """The responses' indices in `count` shares of about as many tokens, the same on every rank."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(rollouts, key=lambda index: (-rollouts[index].num_tokens, index)):
        least = loads.index(min(loads))
        shares[least].append(index)
        loads[least] += rollouts[index].num_tokens
    return shares

"""vLLM as the rollout engine: server processes, each a replica with its own tensor parallelism, which get the student's weights
by a refit. Rank 0 distributes the prompts over them and broadcasts the responses to all ranks.

A server that dies or hangs is started again, refitted, and only then used; its unfinished responses are sampled again.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from kdrl_mcore.config import LoraConfig, RolloutConfig
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import EngineError, KdrlError, RefitError
from kdrl_mcore.parallel.collect import from_first_rank
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.dispatch import Complete, Dispatch, Event, ExpectedLengths, Failure, Response, Submitted
from kdrl_mcore.rollout.engine import Choose, OnPart, Request, Sampling, Weights, with_beginning
from kdrl_mcore.rollout.refit.refit import send_weights
from kdrl_mcore.rollout.vllm.client import ServerFailed
from kdrl_mcore.rollout.vllm.placement import Replicas
from kdrl_mcore.types import Prompt, Rollout

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 60.0
"""How often rank 0 signals the others that generation continues: a collective that waits longer than the process group's
time-out would end the job."""


class VllmEngine:
    """All replicas, as one rank sees them."""

    verifies = True

    def __init__(
        self,
        replicas: Replicas,
        config: RolloutConfig,
        tokenizer: Tokenizer,
        verifier: Verifier | None,
        *,
        vocab_size: int,
        on_progress: Callable[[], None] = lambda: None,
        lora: LoraConfig | None = None,
    ) -> None:
        """Args:
        replicas: the servers, started and ready.
        verifier: on rank 0; verifies all responses that have an answer to compare with.
        vocab_size: the number of token ids that can be trained on.
        lora: the student's adapters, if a refit sends these alone.
        on_progress: called on every rank while the servers make progress (one that makes none is found by time-outs).
        """
        self._replicas, self._config, self._settings = replicas, config, config.vllm
        self._tokenizer, self._verifier, self._vocab_size = tokenizer, verifier, vocab_size
        self._lengths = ExpectedLengths()
        self._student: Weights | None = None
        self._version: int | None = None  # of the weights that all servers hold
        self._tickets = 0  # given out so far
        self._unfinished: set[int] = set()  # tickets that were not taken out yet
        self._work: _Work | None = None  # rank 0's part, while there are any
        self._restarts = [0] * len(replicas)  # since the replica last took part in a whole batch
        self._on_progress, self._lora = on_progress, lora

    def refit(self, student: Weights) -> None:
        """See `RolloutEngine`. Does nothing if the servers already have these weights.

        Raises:
            EngineError: on all ranks, if a server cannot be brought back.
        """
        self._student = student
        if self._version != student.version:
            if self._work is not None:
                self._work.dispatch.expect(student.version)
            self._bring_up(range(len(self._replicas)))
            self._version = student.version
            if self._work is not None:
                self._work.dispatch.renew(student.version)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutEngine`. Earlier submissions continue meanwhile.

        Raises:
            EngineError: on all ranks, if a server cannot be brought back, refuses a request or has stale weights.
        """
        tickets = self.submit(prompts, sampling)
        parts = None
        if on_part is not None and sampling.part_tokens:
            parts = _Parts(tickets, sampling.part_tokens, sampling.responses_per_prompt, on_part)
        wanted = set(tickets)
        groups = self._collect(lambda complete: tickets if wanted <= set(complete) else None, parts)
        return [rollout for ticket in tickets for rollout in groups[ticket]]

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, indices: Sequence[int] | None = None) -> list[int]:
        """See `FlowingEngine`; threads of rank 0 sample.

        Raises:
            EngineError: on all ranks, if the servers have stale weights.
        """
        tickets = self._new_tickets(len(prompts))
        numbers = range(len(prompts)) if indices is None else indices
        self._submit([Submitted(*each, sampling) for each in zip(tickets, prompts, numbers, strict=True)])
        return tickets

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """See `RolloutEngine`. vLLM reads the response so far as a part of the prompt.

        Raises:
            EngineError: see `generate`.
        """
        tickets = self._new_tickets(len(requests))
        self._submit([_submitted(*each, sampling) for each in zip(tickets, requests, strict=True)])
        wanted, decode = set(tickets), self._tokenizer.decode_response
        groups = self._collect(lambda complete: tickets if wanted <= set(complete) else None, None)
        return [
            with_beginning(request, replace(part, group_id=index), sampling.max_response_tokens, decode)
            for index, (ticket, request) in enumerate(zip(tickets, requests, strict=True))
            for part in groups[ticket]
        ]

    def _new_tickets(self, count: int) -> list[int]:
        tickets = list(range(self._tickets, self._tickets + count))
        self._tickets += count
        self._unfinished.update(tickets)
        return tickets

    def _submit(self, submitted: Sequence[Submitted]) -> None:
        assert self._student is not None
        if self._version != self._student.version:
            raise EngineError(
                f"the engines have weight version {self._version}, the student {self._student.version}: refit first"
            )
        if submitted and dist.get_rank() == 0:
            if self._work is None:
                self._work = _Work(self, self._version)
            self._work.submit(submitted)

    def collect(self, choose: Choose) -> dict[int, list[Rollout]]:
        """See `FlowingEngine`. A server that failed meanwhile gets the student's current weights.

        Raises:
            EngineError: see `generate`.
        """
        return self._collect(choose, None)

    def _collect(self, choose: Choose, parts: _Parts | None) -> dict[int, list[Rollout]]:
        assert self._student is not None
        if not self._unfinished:
            return {}
        try:
            while True:
                event = from_first_rank(None if self._work is None else self._work.next_event(choose, parts))
                self._on_progress()
                if isinstance(event, Failure):
                    self._bring_up([event.index], event.reason)
                elif isinstance(event, _Part):
                    if parts is not None:
                        parts.on_part(event.rollouts)
                elif isinstance(event, BaseException):
                    raise event
                elif isinstance(event, dict):
                    break
        except BaseException:
            self._stop_sampling()
            raise
        self._restarts = [0] * len(self._replicas)
        self._unfinished -= event.keys()
        if not self._unfinished:  # no thread of rank 0 is left while the ranks do other work
            self._stop_sampling()
        return event

    def sleep(self) -> None:
        """See `RolloutEngine`. Only engines that share GPUs with training sleep; they need a refit to get their weights
        back."""
        if self._settings.placement == "colocated" and self._replicas.each(lambda server: server.sleep()):
            self._version = None

    def close(self) -> None:
        """See `RolloutEngine`."""
        self._stop_sampling()
        self._replicas.stop()

    def _stop_sampling(self) -> None:
        self._unfinished.clear()
        if self._work is not None:
            self._work.stop()
            self._work = None

    def _bring_up(self, indices: Sequence[int], failure: str | None = None) -> None:
        """Give these replicas the student's weights; one that fails is started again first. Collective over the world.

        Args:
            failure: why the replica, then the only one, has already failed.
        """
        assert self._student is not None
        failures = {} if failure is None else {indices[0]: failure}
        restarted: set[int] = set()
        while True:
            for index, reason in failures.items():
                self._restarts[index] += 1
                if self._restarts[index] > self._settings.restarts:
                    raise EngineError(
                        f"vLLM engine {index} failed {self._restarts[index]} times and is not started again (last: {reason}): "
                        f"see {self._replicas.servers[index].log}, then start the same command again"
                    )
                if dist.get_rank() == 0:
                    logger.warning("vLLM engine %d is being restarted: %s", index, reason)
            restarted.update(failures)
            failures = self._replicas.restart(list(failures)) or self._refit(indices, self._student)
            if not failures:
                break
        if self._work is not None:
            for index in sorted(restarted):
                self._work.dispatch.bring_back(index, self._student.version)

    def _refit(self, indices: Sequence[int], student: Weights) -> dict[int, str]:
        """Send the student's weights. Returns the replicas that did not get them, each with the reason. Collective over the
        world.

        Colocated engines allocate their memory in two steps: first for the weights, then, after the refit has freed its own
        memory, for the KV cache, which uses all that training leaves.
        """
        settings = self._settings
        self._replicas.make_room()
        failures = self._replicas.failures(lambda server: server.wake(["weights"]), indices)
        if failures:
            return failures
        reason = "it does not answer"
        student.wait_for_weights()
        try:
            result = send_weights(
                student.parts,
                self._replicas.own(indices),
                student.version,
                settings.refit_timeout,
                settings.refit_bucket_mib * 2**20,
                colocated=settings.placement == "colocated",
                workers=settings.tensor,
                lora=self._lora,
            )
            if dist.get_rank() == 0:
                logger.debug("refit to version %d: %d bytes in %.2f s", result.version, result.num_bytes, result.seconds)
        except RefitError as error:
            reason = str(error)
            if dist.get_rank() == 0:
                logger.warning("%s", reason)

        self._replicas.make_room()

        def check(server: Any) -> None:
            health = server.health()
            if not health["usable"] or health["version"] != student.version:
                raise ServerFailed(reason)
            server.wake(["kv_cache"])

        return self._replicas.failures(check, indices)


def _submitted(ticket: int, request: Request, sampling: Sampling) -> Submitted:
    """What the dispatch samples for a request."""
    key = request.key if request.begun is None else (*request.key, request.position)  # other draws than those before
    own = replace(sampling, max_response_tokens=request.tokens, responses_per_prompt=request.count, key=key)
    return Submitted(ticket, replace(request.prompt, token_ids=request.token_ids), request.first // request.count, own)


@dataclass(frozen=True)
class _Parts:
    """The parts that `generate` passes on while other groups are sampled: groups of these tickets with at least `tokens`
    tokens."""

    tickets: Sequence[int]
    tokens: int
    responses_per_prompt: int
    on_part: OnPart
    announced: set[int] = field(default_factory=set)

    def next(self, complete: Mapping[int, list[Rollout]]) -> _Part | None:
        """The next part, if there are enough tokens for one."""
        part: dict[int, Rollout] = {}
        groups = [index for index, ticket in enumerate(self.tickets) if ticket in complete and ticket not in self.announced]
        for index in groups:
            first = index * self.responses_per_prompt
            part |= {first + number: rollout for number, rollout in enumerate(complete[self.tickets[index]])}
        if not part or sum(rollout.num_tokens for rollout in part.values()) < self.tokens:
            return None
        self.announced.update(self.tickets[index] for index in groups)
        return _Part(part)


@dataclass(frozen=True)
class _Part:
    """Whole verified groups, by the responses' indices in the batch."""

    rollouts: dict[int, Rollout]


class _Work:
    """Rank 0's part of the sampling: the dispatch, and the verification of responses that have arrived."""

    def __init__(self, engine: VllmEngine, version: int) -> None:
        self._engine = engine
        self._submitted: dict[int, Submitted] = {}  # by ticket, until complete
        self._rollouts: dict[int, dict[int, Rollout]] = {}  # verified, by ticket and number, until the group is complete
        self._complete: dict[int, list[Rollout]] = {}  # by ticket, in the order of completion, until taken out
        self._arrived: queue.SimpleQueue[tuple[int, int, Rollout] | None] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self.dispatch = Dispatch(engine._replicas.servers, version, engine._config.max_sequences, engine._lengths, self._keep)
        self._thread.submit(self._verify)
        self.dispatch.start()

    def submit(self, prompts: Sequence[Submitted]) -> None:
        """Begin to sample."""
        self._submitted.update((each.ticket, each) for each in prompts)
        self.dispatch.submit(prompts)

    def next_event(self, choose: Choose, parts: _Parts | None) -> dict[int, list[Rollout]] | _Part | Event:
        """The groups to take out, once there are enough; otherwise a part, or the result of `Dispatch.next_event`."""
        while True:
            chosen = choose(list(self._complete))
            if chosen is not None:
                return {ticket: self._complete.pop(ticket) for ticket in chosen}
            if parts is not None and (part := parts.next(self._complete)) is not None:
                return part
            event = self.dispatch.next_event(_BEAT_SECONDS)
            if isinstance(event, Complete):
                self._complete[event.ticket] = event.rollouts
                continue
            if isinstance(event, BaseException) and not isinstance(event, KdrlError):
                # A bug of this program; not every exception can be pickled for the other ranks.
                logger.error("rank 0 failed while the engines sampled", exc_info=event)
                return RuntimeError(f"rank 0: {type(event).__name__}: {event}")
            return event

    def stop(self) -> None:
        """End both threads."""
        self.dispatch.stop()
        self._arrived.put(None)
        self._thread.shutdown()

    def _keep(self, response: Response) -> None:
        ticket, number = response.index
        submitted = self._submitted[ticket]
        prompt = submitted.prompt
        if (largest := int(response.token_ids.max())) >= self._engine._vocab_size:
            raise EngineError(
                f"a vLLM engine sampled token id {largest}, but the models share {self._engine._vocab_size} tokens: start its "
                f"server with --vocabulary {self._engine._vocab_size}"
            )
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            group_id=submitted.index,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=response.token_ids,
            sampler_log_probs=response.log_probs,
            finish_reason=response.finish_reason,
            weight_version=response.versions[0][0],
            later_versions=response.versions[1:],
            prompt=prompt.text,
            response=self._engine._tokenizer.decode_response(response.token_ids),
            answer=prompt.answer,
            domain=prompt.domain,
            columns=prompt.columns,
            teacher_prompts=prompt.teacher_prompts,
        )
        self._arrived.put((ticket, number, rollout))

    def _verify(self) -> None:
        """Verify responses as they arrive, and announce complete groups, until None arrives."""
        try:
            while True:
                arrived = [self._arrived.get()]
                while not self._arrived.empty():
                    arrived.append(self._arrived.get())
                responses = [each for each in arrived if each is not None]
                unverified = [rollout for ticket, _, rollout in responses if self._submitted[ticket].sampling.verify]
                if self._engine._verifier is not None and unverified:
                    self._engine._verifier.score(unverified)
                for ticket, number, rollout in responses:
                    self._add(ticket, number, rollout)
                if len(responses) < len(arrived):
                    return
        except BaseException as error:  # `next_event` returns it to the other thread
            self.dispatch.announce(error)

    def _add(self, ticket: int, number: int, rollout: Rollout) -> None:
        group = self._rollouts.setdefault(ticket, {})
        group[number] = rollout
        if len(group) == self._submitted[ticket].sampling.responses_per_prompt:
            del self._rollouts[ticket], self._submitted[ticket]
            self.dispatch.announce(Complete(ticket, [group[each] for each in sorted(group)]))

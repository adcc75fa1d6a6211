"""vLLM as the rollout engine: server processes, each a replica with its own tensor parallelism, which get the student's weights
by a refit. Rank 0 distributes the prompts over them and broadcasts the responses to all ranks.

A server that dies or hangs is started again, refitted, and only then used; its unfinished responses are sampled again.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from kdrl_mcore.config import RolloutConfig
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import EngineError, KdrlError, RefitError
from kdrl_mcore.parallel.collect import from_first_rank
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.dispatch import Dispatch, Event, ExpectedLengths, Failure, Response
from kdrl_mcore.rollout.engine import OnPart, Sampling, Weights
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
    ) -> None:
        """Args:
        replicas: the servers, started and ready.
        verifier: on rank 0; verifies all responses that have an answer to compare with.
        vocab_size: the number of token ids that can be trained on.
        on_progress: called on every rank while the servers make progress (time-outs find one that does not).
        """
        self._replicas, self._config, self._settings = replicas, config, config.vllm
        self._tokenizer, self._verifier, self._vocab_size = tokenizer, verifier, vocab_size
        self._lengths = ExpectedLengths()
        self._student: Weights | None = None
        self._version: int | None = None  # of the weights that all servers hold
        self._is_sampling = False  # between `begin` and `finish`
        self._work: _Work | None = None  # rank 0's part of it
        self._restarts = [0] * len(replicas)  # since the replica last took part in a whole batch
        self._on_progress = on_progress

    def refit(self, student: Weights) -> None:
        """See `RolloutEngine`. Does nothing if the servers already have these weights.

        Raises:
            EngineError: on all ranks, if a server cannot be brought back.
        """
        self._student = student
        if self._version != student.version:
            self._bring_up(range(len(self._replicas)))
            self._version = student.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutEngine`.

        Raises:
            EngineError: on all ranks, if a server cannot be brought back, refuses a request or has stale weights.
        """
        self.begin(prompts, sampling)
        return self.finish(on_part)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Start to sample, in threads of rank 0, without communication between ranks.

        Raises:
            EngineError: on all ranks, if the servers have stale weights.
        """
        assert self._student is not None and not self._is_sampling
        if self._version != self._student.version:
            raise EngineError(
                f"the engines have weight version {self._version}, the student {self._student.version}: refit first"
            )
        self._is_sampling = bool(prompts)
        if prompts and dist.get_rank() == 0:
            self._work = _Work(self, prompts, sampling)

    def finish(self, on_part: OnPart | None = None) -> list[Rollout]:
        """The responses to the prompts of `begin`, on every rank. A server that failed meanwhile gets the student's current
        weights.

        Raises:
            EngineError: see `generate`.
        """
        assert self._student is not None
        if not self._is_sampling:
            return []
        work = self._work
        try:
            while True:
                event = from_first_rank(None if work is None else work.next_event())
                self._on_progress()
                if isinstance(event, Failure):
                    self._bring_up([event.index], event.reason)
                    if work is not None:
                        work.dispatch.bring_back(event.index, self._student.version)
                elif isinstance(event, dict):
                    if on_part is not None:
                        on_part(event)
                elif isinstance(event, BaseException):
                    raise event
                elif isinstance(event, list):
                    self._restarts = [0] * len(self._replicas)
                    return event
        finally:
            self._stop_sampling()

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
        self._is_sampling = False
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
        while True:
            for index, reason in failures.items():
                self._restarts[index] += 1
                if self._restarts[index] > self._settings.restarts:
                    raise EngineError(
                        f"vLLM engine {index} failed {self._restarts[index]} times and is given up (last: {reason}): see "
                        f"{self._replicas.servers[index].log}, then start the same command again"
                    )
                if dist.get_rank() == 0:
                    logger.warning("vLLM engine %d is started again: %s", index, reason)
            failures = self._replicas.restart(list(failures)) or self._refit(indices, self._student)
            if not failures:
                return

    def _refit(self, indices: Sequence[int], student: Weights) -> dict[int, str]:
        """Send the student's weights. Returns the replicas that did not get them, each with the reason. Collective over the
        world.

        Colocated engines allocate their memory in two steps: first for the weights, then, after the refit has freed its own
        memory, for the KV cache, which takes all that training leaves.
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


class _Work:
    """Rank 0's part of one generation: the dispatch, and the verification of responses that have arrived."""

    def __init__(self, engine: VllmEngine, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._engine, self._prompts, self._sampling = engine, prompts, sampling
        self._rollouts: dict[tuple[int, int], Rollout] = {}
        self._verified: dict[int, dict[int, Rollout]] = {}  # by group and index in the batch, until announced
        self._arrived: queue.SimpleQueue[tuple[int, Rollout] | None] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._verification = self._thread.submit(self._verify)
        self.dispatch = Dispatch(
            engine._replicas.servers,
            prompts,
            sampling,
            engine._version,
            engine._config.max_sequences,
            engine._lengths,
            self._keep,
        )
        self.dispatch.start()

    def next_event(self) -> Event | list[Rollout]:
        """The result of `Dispatch.next_event`, with all rollouts in the batch's order in place of "done"."""
        event: Event | list[Rollout] = self.dispatch.next_event(_BEAT_SECONDS)
        if event == "done":
            self._arrived.put(None)
            event = self._verification.exception() or [self._rollouts[index] for index in sorted(self._rollouts)]
        if isinstance(event, BaseException) and not isinstance(event, KdrlError):
            # A bug of this program; not every exception can be pickled for the other ranks.
            logger.error("rank 0 failed while the engines sampled", exc_info=event)
            event = RuntimeError(f"rank 0: {type(event).__name__}: {event}")
        return event

    def stop(self) -> None:
        """End both threads."""
        self.dispatch.stop()
        self._arrived.put(None)
        self._thread.shutdown()

    def _keep(self, response: Response) -> None:
        index, number = response.index
        prompt = self._prompts[index]
        assert response.version is not None
        if (largest := int(response.token_ids.max())) >= self._engine._vocab_size:
            raise EngineError(
                f"a vLLM engine sampled token id {largest}, but the models share {self._engine._vocab_size} tokens: start its "
                f"server with --vocabulary {self._engine._vocab_size}"
            )
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            group_id=index,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=response.token_ids,
            sampler_log_probs=response.log_probs,
            finish_reason=response.finish_reason,
            weight_version=response.version,
            prompt=prompt.text,
            response=self._engine._tokenizer.decode_response(response.token_ids),
            answer=prompt.answer,
            domain=prompt.domain,
            columns=prompt.columns,
        )
        self._rollouts[response.index] = rollout
        self._arrived.put((index * self._sampling.responses_per_prompt + number, rollout))

    def _verify(self) -> None:
        """Verify responses as they arrive, and announce them in parts of whole groups, until None arrives."""
        verifier = self._engine._verifier if self._sampling.verify else None
        while True:
            arrived = [self._arrived.get()]
            while not self._arrived.empty():
                arrived.append(self._arrived.get())
            rollouts = dict(each for each in arrived if each is not None)
            if verifier is not None and rollouts:
                verifier.score(list(rollouts.values()))
                if self._sampling.part_tokens:
                    self._announce(rollouts)
            if len(rollouts) < len(arrived):
                return

    def _announce(self, verified: dict[int, Rollout]) -> None:
        for index, rollout in verified.items():
            self._verified.setdefault(rollout.group_id, {})[index] = rollout
        whole = {
            group: responses
            for group, responses in self._verified.items()
            if len(responses) == self._sampling.responses_per_prompt
        }
        part = {index: rollout for responses in whole.values() for index, rollout in responses.items()}
        if sum(rollout.num_tokens for rollout in part.values()) >= self._sampling.part_tokens:
            self.dispatch.announce(part)
            for group in whole:
                del self._verified[group]

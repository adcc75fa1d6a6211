"""vLLM as the rollout engine: servers in processes of their own, each a replica with its own tensor parallelism, which get the
student's weights by a refit. Rank 0 shares the prompts among them and hands the responses to all ranks.

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
from kdrl_mcore.reward.verifier import Verifier
from kdrl_mcore.rollout.dispatch import Dispatch, ExpectedLengths, Failure, Response
from kdrl_mcore.rollout.engine import OnPart, Sampling, Weights
from kdrl_mcore.rollout.refit import send_weights
from kdrl_mcore.rollout.vllm_client import ServerFailed
from kdrl_mcore.rollout.vllm_placement import Replicas
from kdrl_mcore.types import Prompt, Rollout

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 60.0
"""Rank 0 tells the others this often that the generation goes on: a collective that waits longer than the process group's
time-out would end the job."""


class VllmEngine:
    """All replicas, seen from one rank."""

    verifies = True

    def __init__(self, replicas: Replicas, config: RolloutConfig, tokenizer: Tokenizer, verifier: Verifier | None) -> None:
        """Args:
        replicas: started, and ready.
        verifier: on rank 0, of all responses that have an answer to compare with.
        """
        self._replicas, self._config, self._settings = replicas, config, config.vllm
        self._tokenizer, self._verifier = tokenizer, verifier
        self._lengths = ExpectedLengths()
        self._student: Weights | None = None
        self._version: int | None = None  # of the weights that all servers hold
        self._is_sampling = False  # between `begin` and `finish`
        self._work: _Work | None = None  # rank 0's part of it
        self._restarts = [0] * len(replicas)  # since the replica last took part in a whole batch
        self.on_wait: Callable[[], None] = lambda: None
        """Called on every rank as long as the servers make progress (one that does not is found by its own time-outs)."""

    def refit(self, student: Weights) -> None:
        """See `RolloutEngine`. Does nothing where the servers have these weights already.

        Raises:
            EngineError: on all ranks: a server cannot be brought back.
        """
        self._student = student
        if self._version != student.version:
            self._bring_up(range(len(self._replicas)))
            self._version = student.version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, on_part: OnPart | None = None) -> list[Rollout]:
        """See `RolloutEngine`.

        Raises:
            EngineError: on all ranks: a server cannot be brought back, refuses a request, or has stale weights.
        """
        self.begin(prompts, sampling)
        return self.finish(on_part)

    def begin(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Start to sample, in threads of rank 0; no communication among ranks.

        Raises:
            EngineError: on all ranks: the servers have stale weights.
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
        """The responses of `begin`, on every rank. A server that failed meanwhile gets the student's present weights.

        Raises:
            EngineError: see `generate`.
        """
        assert self._student is not None
        if not self._is_sampling:
            return []
        work = self._work
        try:
            while True:
                event = _from_rank_0(None if work is None else work.next_event())
                self.on_wait()
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
        """See `RolloutEngine`. Only engines that share the training's GPUs sleep; a refit has to bring their weights again."""
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
            failure: why the (only) replica has failed already.
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
        """Send the student's weights; the replicas that did not get them, with the reason.

        Colocated engines get their memory in two parts: the weights', and when these are there, and what the refit took has
        been given back, the KV cache's, which fills what training leaves.
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
    """Rank 0's part of one generation: the dispatch, and the verification of what has arrived."""

    def __init__(self, engine: VllmEngine, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self._engine, self._prompts, self._sampling = engine, prompts, sampling
        self._rollouts: dict[tuple[int, int], Rollout] = {}
        self._verified: dict[int, dict[int, Rollout]] = {}  # by group and place in the batch, until announced
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

    def next_event(self) -> Any:
        """A failure, an error, a part of the rollouts as a dictionary, all of them as a list at the end, or "waiting"."""
        event: Any = self.dispatch.next_event(_BEAT_SECONDS)
        if event == "done":
            self._arrived.put(None)
            event = self._verification.exception() or [self._rollouts[place] for place in sorted(self._rollouts)]
        if isinstance(event, BaseException) and not isinstance(event, KdrlError):
            # A fault of this program; not every exception can be sent to the other ranks.
            logger.error("rank 0 failed while the engines sampled", exc_info=event)
            event = RuntimeError(f"rank 0: {type(event).__name__}: {event}")
        return event

    def stop(self) -> None:
        """End both threads."""
        self.dispatch.stop()
        self._arrived.put(None)
        self._thread.shutdown()

    def _keep(self, response: Response) -> None:
        place, copy = response.place
        prompt = self._prompts[place]
        assert response.version is not None
        rollout = Rollout(
            prompt_id=prompt.prompt_id,
            group_id=place,
            prompt_token_ids=prompt.token_ids,
            response_token_ids=response.token_ids,
            sampler_log_probs=response.log_probs,
            finish_reason=response.finish_reason,
            weight_version=response.version,
            prompt=prompt.text,
            response=self._engine._tokenizer.decode_response(response.token_ids),
            answer=prompt.answer,
        )
        self._rollouts[response.place] = rollout
        self._arrived.put((place * self._sampling.copies + copy, rollout))

    def _verify(self) -> None:
        """Verify what has arrived, and announce it in parts of whole groups, until None arrives."""
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
        whole = {group: responses for group, responses in self._verified.items() if len(responses) == self._sampling.copies}
        part = {index: rollout for responses in whole.values() for index, rollout in responses.items()}
        if sum(rollout.num_tokens for rollout in part.values()) >= self._sampling.part_tokens:
            self.dispatch.announce(part)
            for group in whole:
                del self._verified[group]


def _from_rank_0(item: Any) -> Any:
    shared = [item]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]

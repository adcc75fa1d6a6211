"""Everything that depends on vLLM's version (0.32 and 0.33, CPU and CUDA): engine arguments, sampling, weights, sleep.

Imported by engine servers and by vLLM's own worker processes, never by a training rank.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from kdrl_mcore.errors import RefitError
from kdrl_mcore.rollout.vllm_client import kill_group

STREAM_INTERVAL = 32
"""Tokens of a response between two signs of its progress."""
_WATCH_SECONDS = 0.5
_CPU_STEP_TOKENS = 4096  # of one step of vLLM on CPU, where a longer prompt fits too
_CUDA_STEP_TOKENS = 8192  # of one step on a GPU; an engine that is made as ours is would get 2048, too few for a GPU's prefill
_SERVER_PID = "KDRL_ENGINE_SERVER_PID"
"""The environment variable by which vLLM's processes know their server. It is no part of vLLM's configuration, under whose hash
vLLM keeps what it has compiled: the next start would find nothing."""
_SOCKET_FOLDER = 107 - len("/") - 36  # longest name of a folder in which vLLM's sockets, named by a UUID, can be opened


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built from.

    Attributes:
        vocabulary: tokens of the tokenizer; columns of the model beyond them are never sampled, as in the trainer.
        stop_ids: token ids that end a response.
        dtype: of the weights, float32 or bfloat16.
        max_model_len: prompt and response tokens together.
        max_sequences: responses decoded at once.
        gpu_memory_utilization: share of a GPU for weights and KV cache. kv_cache_gib: the KV cache on CPU, GiB.
        load_format: of the weights; `dummy` where a refit brings them.
    """

    model: str
    vocabulary: int
    stop_ids: tuple[int, ...]
    dtype: Any
    max_model_len: int
    max_sequences: int
    tensor: int
    seed: int
    gpu_memory_utilization: float
    kv_cache_gib: float
    load_format: str


@dataclass(frozen=True)
class Finished:
    """One finished response."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


class Engine:
    """vLLM's asynchronous engine, reduced to what rollouts need."""

    def __init__(self, settings: EngineSettings) -> None:
        """Start vLLM's processes and load the model; takes from half a minute to minutes."""
        self._settings = settings
        self._sleeps = torch.cuda.is_available()
        os.environ[_SERVER_PID] = str(os.getpid())
        args = engine_args(settings, self._sleeps)
        config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        if self._sleeps:
            # A forked process has no use of CUDA once anything here has touched it, and this one has threads.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        else:
            # vLLM's processes are forked: spawned ones, which it chooses on CPU, would import everything once more. Nothing has
            # been computed in this process, so OpenMP has no threads yet that a fork would lose.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            torch.compiler.set_stance("force_eager")  # compiling the sampler takes longer than it saves; forked as well
        self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)

    @property
    def dead(self) -> bool:
        """Whether vLLM's own processes have failed."""
        return self._llm.errored

    async def check_health(self) -> None:
        """Raise if vLLM's own processes have failed."""
        await self._llm.check_health()

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], seed: int, sampling: Mapping[str, Any]
    ) -> AsyncIterator[Finished | None]:
        """One response: None now and then while it grows, and in the end the response."""
        params = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            max_tokens=sampling["max_tokens"],
            seed=seed,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=list(self._settings.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        token_ids: list[int] = []
        log_probs: list[float] = []
        async for output in self._llm.generate({"prompt_token_ids": list(prompt_token_ids)}, params, request_id):
            part = output.outputs[0]
            token_ids += part.token_ids
            columns: Any = part.logprobs or ()  # by token id, of each token
            log_probs += [column[token].logprob for token, column in zip(part.token_ids, columns, strict=True)]
            yield None if part.finish_reason is None else Finished(token_ids, log_probs, part.finish_reason)

    async def receive_weights(self, spec: Mapping[str, Any]) -> list[Any]:
        """Every worker takes the weights that a refit sends (`vllm_worker.RefitWorker`), and nothing computed with the old
        ones stays in the prefix cache. Returns each worker's answer.

        Raises:
            RefitError: a worker did not get them.
        """
        answers = await self._llm.collective_rpc("try_to_receive_weights", args=(dict(spec),))
        errors = {answer["error"] for answer in answers if "error" in answer}
        if errors:
            raise RefitError("; ".join(sorted(errors)))
        await self._llm.reset_prefix_cache()
        return answers

    async def sleep(self) -> bool:
        """Give weights and KV cache back to the GPU; whether they are gone. On CPU nothing is to be given back."""
        if self._sleeps:
            await self._llm.sleep(level=2)
        return self._sleeps

    async def wake(self, tags: Sequence[str]) -> None:
        """Take GPU memory again for `weights` (whose content a refit has to bring) or `kv_cache`."""
        if self._sleeps:
            await self._llm.wake_up(list(tags))

    def shutdown(self) -> None:
        """End vLLM's processes at once: they have nothing to save."""
        self._llm.shutdown(timeout=0)


def engine_args(settings: EngineSettings, cuda: bool) -> AsyncEngineArgs:
    """vLLM's arguments."""
    on_device: dict[str, Any] = (
        {
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "enable_sleep_mode": True,
            "max_num_batched_tokens": max(_CUDA_STEP_TOKENS, settings.max_sequences),
        }
        if cuda
        else {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
            "enforce_eager": True,
            # After a part of a prompt vLLM winds the request's generator back, which torch cannot do on CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_STEP_TOKENS, settings.max_model_len),
        }
    )
    if not cuda and settings.tensor == 1:
        # A third process, only to bind OpenMP's threads, would take half as long again to start.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_device["distributed_executor_backend"] = "uni"
    elif not cuda:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default each worker wants a NUMA node
    if len(tempfile.gettempdir()) > _SOCKET_FOLDER:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", "/tmp")
    return AsyncEngineArgs(
        model=settings.model,
        dtype=settings.dtype,
        load_format=settings.load_format,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_sequences,
        tensor_parallel_size=settings.tensor,
        seed=settings.seed,
        skip_tokenizer_init=True,  # token ids in, token ids out; the stop ids are ours
        generation_config="vllm",  # no defaults of the model's own
        logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, at its temperature
        logits_processors=[f"{__name__}:OnlyTokens"],
        additional_config={"num_tokens": settings.vocabulary},
        worker_extension_cls="kdrl_mcore.rollout.vllm_worker.RefitWorker",
        stream_interval=STREAM_INTERVAL,
        disable_log_stats=True,
        enable_prefix_caching=True,
        **on_device,
    )


class OnlyTokens(LogitsProcessorV1, LogitsProcessorV2):
    """Masks the columns of the logits that no token has, under either of vLLM's model runners (the second one, where there is
    Triton, has an interface of its own). Made in each of vLLM's worker processes, where it also sees to it that they end with
    the server and leave no shared memory behind."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self._num_tokens = vllm_config.additional_config["num_tokens"]
        end_group_with(int(os.environ[_SERVER_PID]))
        unlink_shared_memory()

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """See vLLM. logits: [rows, columns], changed in place."""
        logits[:, self._num_tokens :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        """See vLLM."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """See vLLM; there is no state."""


def unlink_shared_memory() -> None:
    """On CPU the workers of one engine talk through shared memory, which nobody would remove if they were killed. All have
    opened it when the first one gets here, so it needs no name any more."""
    name = os.environ.get("VLLM_DIST_IDENT")
    for file in Path("/dev/shm").glob(f"{name}-*") if name else ():
        file.unlink(missing_ok=True)


def end_group_with(pid: int) -> None:
    """Kill this process's group, which is that of one engine server, soon after the process `pid` ends."""

    def watch() -> None:
        try:
            process = psutil.Process(pid)
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(_WATCH_SECONDS)
        except psutil.NoSuchProcess:
            pass
        kill_group(os.getpgrp())

    threading.Thread(target=watch, daemon=True).start()

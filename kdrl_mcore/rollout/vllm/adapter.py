"""All code that depends on the vLLM version (0.32 and 0.33, CPU and CUDA): engine arguments, sampling, weights, sleep.

Imported by engine servers and by vLLM's own worker processes, never by a training rank.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from kdrl_mcore.config.keys import nearest
from kdrl_mcore.errors import ConfigError, EngineError, RefitError
from kdrl_mcore.rollout.experts import encode
from kdrl_mcore.rollout.stops import StopStrings
from kdrl_mcore.rollout.vllm.client import kill_group

STREAM_INTERVAL = 32
"""Tokens of a response between two reports of its progress."""
_WATCH_SECONDS = 0.5
_CPU_STEP_TOKENS = 4096  # tokens of a step on CPU, raised if prompts are longer
_CUDA_STEP_TOKENS = 8192  # tokens of a step on a GPU; vLLM's default for our way of building an engine, 2048, is too few
_SERVER_PID = "KDRL_ENGINE_SERVER_PID"
"""The environment variable with the server's process id, for vLLM's processes. It cannot be part of vLLM's configuration: vLLM
caches compiled code under the configuration's hash, and the next start would not find it."""
_SOCKET_FOLDER = 107 - len("/") - 36  # longest folder name in which vLLM can open its sockets, which are named by a UUID


@dataclass(frozen=True)
class EngineSettings:
    """The settings from which an engine is built.

    Attributes:
        vocab_size: tokens of the tokenizer; the model's further columns are never sampled, as in the trainer.
        stop_ids: token ids that end a response.
        dtype: the weights' dtype, float32 or bfloat16.
        max_model_len: the most prompt and response tokens together.
        max_sequences: responses decoded at once.
        gpu_memory_utilization: share of a GPU for weights and KV cache.
        kv_cache_gib: size of the KV cache on CPU, GiB.
        load_format: how weights are loaded; `dummy` if they come with a refit.
        lora_rank: the largest rank of adapters that come with a refit; 0: whole weights come.
        extra: further arguments of vLLM's engine, which take precedence.
        tokenizer: of the `tokenizers` library, for stop strings.
        return_experts: whether responses come with the experts that routers chose (0 or 1).
    """

    model: str
    vocab_size: int
    stop_ids: tuple[int, ...]
    dtype: Any
    max_model_len: int
    max_sequences: int
    tensor: int
    seed: int
    gpu_memory_utilization: float
    kv_cache_gib: float
    load_format: str
    lora_rank: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    return_experts: int = 0


@dataclass(frozen=True)
class Finished:
    """One finished response."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    versions: list[tuple[int | None, int]]
    """(version of the weights, number of tokens that they sampled), in order; None stands for the model directory's weights."""
    experts: dict[str, Any] | None = None
    """What routers chose for every token but the last, [tokens, layers, experts of a token], as `experts.encode` returns it."""


class Engine:
    """vLLM's asynchronous engine, reduced to what rollouts need."""

    def __init__(self, settings: EngineSettings) -> None:
        """Start vLLM's processes and load the model, which takes from half a minute to several minutes."""
        self._settings = settings
        self._sleeps = torch.cuda.is_available()
        os.environ[_SERVER_PID] = str(os.getpid())
        args = engine_args(settings, self._sleeps)
        config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        if self._sleeps:
            # A forked process cannot use CUDA once this process has touched it, and this one has threads.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        else:
            # Fork vLLM's processes: spawned ones, its choice on CPU, would import everything again. Nothing has been computed
            # in this process, so there are no OpenMP threads yet that a fork would lose.
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            torch.compiler.set_stance("force_eager")  # compiling the sampler takes longer than it saves; forks inherit this
        self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
        # The workers have them before any request, so this path is never read.
        self._adapters = adapters_at("refit") if settings.lora_rank else None
        self._updates = 0  # of the weights, so far
        self._without_tokens: set[asyncio.Future[Any]] = set()  # the first outputs of requests that wait for them

    @property
    def dead(self) -> bool:
        """Whether vLLM's own processes have failed."""
        return self._llm.errored

    async def check_health(self) -> None:
        """Raise if vLLM's own processes have failed."""
        await self._llm.check_health()

    async def generate(
        self, request_id: str, prompt_token_ids: Sequence[int], seed: int, sampling: Mapping[str, Any], begun: int = 0
    ) -> AsyncIterator[Finished | None]:
        """Sample one response: yields None from time to time while it grows, and finally the response.

        Stop strings are not vLLM's own, which would not find one that begins in an earlier part of a response. A response that
        completes one is aborted at vLLM's next report; the tokens after it are dropped.

        Args:
            begun: the number of the prompt's last tokens that belong to a response which is continued.
        """
        params = SamplingParams(
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling.get("top_k", 0),
            min_p=sampling.get("min_p", 0.0),
            max_tokens=sampling["max_tokens"],
            seed=seed,
            logprobs=0,  # of the sampled token only
            stop_token_ids=list(self._settings.stop_ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        token_ids: list[int] = []
        log_probs: list[float] = []
        text, end = None, None
        if sampling.get("stop"):
            begun_ids = prompt_token_ids[len(prompt_token_ids) - begun :]
            text = StopStrings(self._settings.tokenizer, sampling["stop"]).begin(begun_ids)
        async for output in self._outputs(request_id, prompt_token_ids, params):
            part = output.outputs[0]
            if text is not None and end is None and (count := text.read(part.token_ids)) is not None:
                end = len(token_ids) + count
                if part.finish_reason is None:
                    await self._llm.abort(output.request_id)
            token_ids += part.token_ids
            columns: Any = part.logprobs or ()  # for each token, log-probs by token id
            log_probs += [column[token].logprob for token, column in zip(part.token_ids, columns, strict=True)]
            if part.finish_reason is None:
                yield None
            else:
                reason, versions = part.finish_reason, _versions(part.weight_versions, end)
                token_ids, log_probs = token_ids[:end], log_probs[:end]
                experts = None
                if sampling.get("experts"):
                    experts = _experts(part.routed_experts, len(prompt_token_ids) + len(token_ids) - 1)
                yield Finished(token_ids, log_probs, reason if end is None else "stop", versions, experts)

    async def _outputs(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Any]:
        """vLLM's outputs for a request, which is restarted if the weights change before its first token."""
        while True:
            updates = self._updates
            # Only requests that were begun under the same weights share blocks of the cache.
            prompt: Any = {"prompt_token_ids": list(prompt_token_ids), "cache_salt": str(updates)}
            stream = self._llm.generate(prompt, params, f"{request_id}.{updates}", lora_request=self._adapters)
            first = asyncio.ensure_future(anext(stream))
            self._without_tokens.add(first)
            try:
                output = await first
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if updates == self._updates or (task is not None and task.cancelling()):
                    raise
                continue
            finally:
                self._without_tokens.discard(first)
            yield output
            async for output in stream:
                yield output
            return

    async def receive_weights(self, spec: Mapping[str, Any], version: int, unfinished: str) -> list[Any]:
        """Have every worker receive the weights of a refit (`transfer.RefitBackend`). Returns each worker's report.

        Args:
            unfinished: what happens to unfinished responses: `wait`: there are none; `keep`: they continue with the cache that
                older weights computed; `recompute`: they continue with a new cache. No other response ever uses the old cache.

        Raises:
            RefitError: a worker did not receive them. The engine must no longer be used.
        """
        if unfinished != "wait":
            await self._llm.pause_generation(mode="keep", clear_cache=unfinished == "recompute")
        if self._adapters is not None:
            answers = await self._llm.collective_rpc("receive_adapters", args=(dict(spec),))
        else:
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest({"spec": dict(spec)}))
            await self._llm.finish_weight_update()
            answers = await self._llm.collective_rpc("refit_report")
        errors = {answer["error"] for answer in answers if "error" in answer}
        if errors:
            raise RefitError("; ".join(sorted(errors)))
        self._updates += 1
        await self._llm.update_weight_version(str(version))
        if unfinished == "wait":
            await self._llm.reset_prefix_cache()
            return answers
        if unfinished == "keep":  # requests without a token restart: they may have found blocks of older weights
            for first in self._without_tokens:
                first.cancel()
        await self._llm.resume_generation()
        return answers

    async def sleep(self) -> bool:
        """Free the GPU memory of weights and KV cache. Returns whether they are gone; on CPU nothing is freed."""
        if self._sleeps:
            await self._llm.sleep(level=2)
        return self._sleeps

    async def wake(self, tags: Sequence[str]) -> None:
        """Allocate GPU memory again for `weights` (whose content comes with a refit) or `kv_cache`."""
        if self._sleeps:
            await self._llm.wake_up(list(tags))

    def shutdown(self) -> None:
        """End vLLM's processes at once; they have nothing to save."""
        self._llm.shutdown(timeout=0)


def adapters_at(path: str, *, replace: bool = False) -> LoRARequest:
    """The adapters of the student, of which an engine has one set at a time.

    Args:
        path: the PEFT folder from which a worker that does not have them reads them.
        replace: they replace those that the worker has.
    """
    return LoRARequest(lora_name="student", lora_int_id=1, lora_path=path, load_inplace=replace)


def _versions(spans: Any, end: int | None = None) -> list[tuple[int | None, int]]:
    """Versions of the weights and the tokens that they sampled, of the first `end` tokens if that is not None."""
    ends = [(span, span.end if end is None else min(span.end, end)) for span in spans or ()]
    return [
        (int(span.version) if span.version.isdecimal() else None, stop - span.start) for span, stop in ends if stop > span.start
    ]


def _experts(routed: Any, rows: int) -> dict[str, Any]:
    """What vLLM's routers chose for the first tokens.

    Raises:
        EngineError: some are missing.
    """
    if routed is None or len(routed) < rows:
        raise EngineError(
            f"vLLM returned the experts of {0 if routed is None else len(routed)} of {rows} tokens: no row may be missing; "
            "start the server with --return-experts 1, on CUDA"
        )
    return encode(routed[:rows] if routed.dtype == np.uint8 else routed[:rows].astype(np.int16))


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
            # After a chunk of a prompt vLLM rewinds the request's generator, which torch cannot do on CPU.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_CPU_STEP_TOKENS, settings.max_model_len),
        }
    )
    if not cuda and settings.tensor == 1:
        # A third process, which would only bind OpenMP threads, would make the start half as long again.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        on_device["distributed_executor_backend"] = "uni"
    elif not cuda:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # by default each worker needs its own NUMA node
    if len(tempfile.gettempdir()) > _SOCKET_FOLDER:
        os.environ.setdefault("VLLM_RPC_BASE_PATH", "/tmp")
    values: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_sequences,
        "tensor_parallel_size": settings.tensor,
        "seed": settings.seed,
        "skip_tokenizer_init": True,  # token ids in, token ids out; the stop ids are ours
        "generation_config": "vllm",  # ignores the model's own defaults
        "logprobs_mode": "processed_logprobs",  # of the distribution that tokens are sampled from, at its temperature
        "logits_processors": [f"{__name__}:OnlyTokens"],
        "additional_config": {"num_tokens": settings.vocab_size},
        "weight_transfer_config": {"backend": "kdrl"},  # transfer.BACKEND, which the next line's module registers
        "worker_extension_cls": "kdrl_mcore.rollout.vllm.transfer.RefitWorker",
        "stream_interval": STREAM_INTERVAL,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
    }
    if settings.return_experts:
        values["enable_return_routed_experts"] = True
    if settings.lora_rank:
        values |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": settings.lora_rank}
    return AsyncEngineArgs(**{**values, **on_device, **settings.extra})


def check_extra(extra: Mapping[str, Any], where: str) -> None:
    """Check that vLLM's engine has these arguments, and that they work on this machine.

    Raises:
        ConfigError: it has no argument of a name, or this machine no GPU that it needs.
    """
    if extra.get("speculative_config") is not None and not torch.cuda.is_available():
        raise ConfigError(
            f"{where}: speculative_config needs CUDA: on CPU vLLM's model runner cannot mask the columns without a token then; "
            "leave it out"
        )
    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in extra:
        if name not in known:
            raise ConfigError(f"{where}: vLLM's engine has no argument {name}{nearest(name, known)}")


class OnlyTokens(LogitsProcessorV1, LogitsProcessorV2):
    """Masks the logits' columns that have no token, under either of vLLM's model runners (the second one, used with Triton, has
    a different interface). vLLM builds one in each of its worker processes, so it also makes them end with the server and leave
    no shared memory behind."""

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self._num_tokens = vllm_config.additional_config["num_tokens"]
        end_group_with(int(os.environ[_SERVER_PID]))
        unlink_shared_memory()

    def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        """See vLLM. `logits` [rows, columns] is changed in place."""
        logits[:, self._num_tokens :] = float("-inf")
        return logits

    def is_argmax_invariant(self) -> bool:
        """See vLLM."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """See vLLM; there is no state."""


def unlink_shared_memory() -> None:
    """On CPU the workers of an engine communicate through shared memory, which nobody would remove if they were killed. All
    have opened it by the time the first one gets here, so its name can be removed now."""
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

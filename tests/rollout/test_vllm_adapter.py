"""How vLLM uses the adapter in the model runner that cannot run on this machine: the second one, the default on CUDA."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import CompletionOutput, WeightVersionSpan
from vllm.v1.sample.logits_processor import build_logitsprocs
from vllm.v1.worker.gpu.sample.logits_processor import (
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from kdrl_mcore.config.engine_arguments import OWN
from kdrl_mcore.errors import ConfigError, EngineError
from kdrl_mcore.rollout.experts import decode
from kdrl_mcore.rollout.vllm import adapter as vllm_adapter

NUM_TOKENS, COLUMNS = 5, 8


SETTINGS = vllm_adapter.EngineSettings(
    model="nowhere",
    vocab_size=NUM_TOKENS,
    stop_ids=(0,),
    dtype="bfloat16",
    max_model_len=64,
    max_sequences=4,
    tensor=1,
    seed=1,
    gpu_memory_utilization=0.5,
    kv_cache_gib=0.1,
    load_format="dummy",
)
STATE: Any = SimpleNamespace(
    device=None, max_num_reqs=4, vocab_size=COLUMNS, all_token_ids=None, prompt_len=None, prefill_len=None, total_len=None
)


@pytest.mark.parametrize("runner", [1, 2])
def test_columns_without_a_token_are_masked_under_both_model_runners(runner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ends_with: list[int] = []
    monkeypatch.setattr(vllm_adapter, "end_group_with", ends_with.append)
    monkeypatch.setenv(vllm_adapter._SERVER_PID, "1")
    config: Any = SimpleNamespace(
        additional_config={"num_tokens": NUM_TOKENS},
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        speculative_config=None,
    )
    names: Any = vllm_adapter.engine_args(SETTINGS, cuda=True).logits_processors
    logits = torch.randn(3, COLUMNS)
    expected = logits.clone()
    expected[:, NUM_TOKENS:] = float("-inf")
    if runner == 1:
        *_, processor = build_logitsprocs(config, torch.device("cpu"), False, False, names).non_argmax_invariant
        masked = processor.apply(logits)
    else:
        (on_gpu,) = build_custom_logits_processors(config, STATE, False, names)
        assert on_gpu.add_request(0, SamplingParams())  # otherwise it would not be applied
        masked = on_gpu.apply(logits, SimpleNamespace())  # type: ignore[arg-type]
    assert torch.equal(masked, expected) and ends_with == [1]


def test_every_start_finds_what_the_one_before_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM caches it under a hash of the whole configuration, in which nothing may differ from process to process."""
    first = vllm_adapter.engine_args(SETTINGS, cuda=True)
    monkeypatch.setattr(vllm_adapter.os, "getpid", lambda: 1)
    assert vllm_adapter.engine_args(SETTINGS, cuda=True) == first


@pytest.mark.parametrize(("sequences", "tokens"), [(256, 8192), (10_000, 10_000)])
def test_a_step_on_a_gpu_takes_enough_tokens(sequences: int, tokens: int) -> None:
    settings = dataclasses.replace(SETTINGS, max_sequences=sequences)
    assert vllm_adapter.engine_args(settings, cuda=True).max_num_batched_tokens == tokens


def test_the_frontend_of_the_second_model_runner_takes_it() -> None:
    names: Any = vllm_adapter.engine_args(SETTINGS, cuda=True).logits_processors
    build_custom_logits_processors_params_validator(names)(SamplingParams())


def test_the_versions_of_a_response_that_is_cut_off_are_those_of_its_tokens() -> None:
    spans = [WeightVersionSpan("3", 0, 5), WeightVersionSpan("4", 5, 9)]
    ends: Any = {None: [(3, 5), (4, 4)], 7: [(3, 5), (4, 2)], 5: [(3, 5)], 2: [(3, 2)]}
    assert {end: vllm_adapter._versions(spans, end) for end in ends} == ends


class FakeLLM:
    """Reports a response of five tokens in two parts, with the experts that vLLM returns on CUDA: of all layers, for every
    token but the last."""

    def __init__(self, routed: np.ndarray | None) -> None:
        self.routed, self.aborted = routed, list[str]()

    async def generate(self, prompt: Any, params: Any, request_id: str, **_: Any) -> AsyncIterator[Any]:
        for token_ids, finish_reason in (([1, 2, 3], None), ([4, 0], "stop")):
            logprobs = [{token: SimpleNamespace(logprob=-1.0)} for token in token_ids]
            part = CompletionOutput(0, "", token_ids, None, logprobs, finish_reason=finish_reason)  # type: ignore[arg-type]
            if finish_reason:
                part.routed_experts, part.weight_versions = self.routed, [WeightVersionSpan("3", 0, 5)]
            yield SimpleNamespace(outputs=[part], request_id=request_id)

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def finished(llm: FakeLLM, **sampling: Any) -> vllm_adapter.Finished:
    """What an engine makes of these reports."""
    engine: Any = object.__new__(vllm_adapter.Engine)
    backend = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate("zabcd")}))
    engine._settings = dataclasses.replace(SETTINGS, tokenizer=backend)
    engine._llm, engine._adapters, engine._updates, engine._without_tokens = llm, None, 0, set()

    async def run() -> Any:
        settings = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "experts": True, **sampling}
        return [each async for each in engine.generate("r", [7, 8], 1, settings) if each is not None]

    (response,) = asyncio.run(run())
    return response


def test_a_response_has_the_experts_of_every_token_but_the_last() -> None:
    """By contract: vLLM returns them on CUDA only."""
    routed = np.arange(6 * 3 * 2, dtype=np.uint8).reshape(6, 3, 2)
    whole, cut = finished(FakeLLM(routed)), finished(llm := FakeLLM(routed), stop=["b"])
    assert (whole.token_ids, whole.finish_reason, whole.versions) == ([1, 2, 3, 4, 0], "stop", [(3, 5)])
    np.testing.assert_array_equal(decode(whole.experts), routed)
    assert (cut.token_ids, cut.finish_reason, cut.versions, llm.aborted) == ([1, 2], "stop", [(3, 2)], ["r.0"])
    np.testing.assert_array_equal(decode(cut.experts), routed[:3])
    for missing in (None, routed[:5]):
        with pytest.raises(EngineError, match="of 6 tokens: no row may be missing"):
            finished(FakeLLM(missing))
    arguments = vllm_adapter.engine_args(dataclasses.replace(SETTINGS, return_experts=1), cuda=True)
    assert arguments.enable_return_routed_experts


def test_further_arguments_take_precedence_and_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 99, "quantization": "fp8", "enable_expert_parallel": True}
    extra["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 3}
    with pytest.raises(ConfigError, match="--extra: speculative_config needs CUDA"):
        vllm_adapter.check_extra(extra, "--extra")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    vllm_adapter.check_extra(extra, "--extra")
    for cuda in (True, False):
        arguments = vllm_adapter.engine_args(dataclasses.replace(SETTINGS, extra=extra), cuda=cuda)
        assert {name: getattr(arguments, name) for name in extra} == extra
    with pytest.raises(ConfigError, match="--extra: vLLM's engine has no argument kv_cache_dtyp"):
        vllm_adapter.check_extra({"kv_cache_dtyp": "fp8"}, "--extra")
    assert not OWN - {each.name for each in dataclasses.fields(AsyncEngineArgs)}

"""Further arguments of vLLM's engine (`rollout.vllm.extra`), as far as they can be checked without vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kdrl_mcore.errors import ConfigError

OWN = frozenset(
    (
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "dtype",
        "load_format",
        "enable_return_routed_experts",
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "max_model_len",
        "max_num_seqs",
        "seed",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "gpu_memory_utilization",
        "enable_sleep_mode",
        "kv_cache_memory_bytes",
        "generation_config",
        "logprobs_mode",
        "logits_processors",
        "additional_config",
        "weight_transfer_config",
        "worker_extension_cls",
        "stream_interval",
        "enable_prefix_caching",
        "distributed_executor_backend",
    )
)
"""vLLM's engine arguments that other options or the way in which this program uses vLLM decide."""


def extra_arguments(words: Sequence[str], where: str) -> dict[str, Any]:
    """Further arguments of vLLM's engine, from words NAME=VALUE with values in JSON, or texts as they are.

    Raises:
        ConfigError: a word is not such a pair, or its name occurs twice or is one of `OWN`.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{where}: '{word}' is not NAME=VALUE, such as kv_cache_dtype=fp8")
        if name in OWN:
            raise ConfigError(f"{where}: {name} follows from other settings (rollout, model, trainer.seed): leave it out")
        if name in arguments:
            raise ConfigError(f"{where} names {name} twice: leave one out")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments

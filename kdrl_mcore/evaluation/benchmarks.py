"""The sets of problems that a run is evaluated on: `data.eval`, and the benchmarks of `conf/benchmark`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kdrl_mcore.config import Config, load_benchmark
from kdrl_mcore.data.prompts import load_prompts
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.types import Prompt


@dataclass(frozen=True)
class Benchmark:
    """Problems under one name. `reward` is the kind of their verifier; None is the run's."""

    name: str
    prompts: list[Prompt]
    reward: str | None = None


def load_benchmarks(config: Config, tokenizer: Tokenizer) -> list[Benchmark]:
    """`data.eval`, named as its file or hub id ends, and `eval.benchmarks`, all with the prompt template of `data`.

    Raises:
        ConfigError, DataError: a benchmark is unknown, named twice or cannot be read.
    """
    data, found = config.data, []
    if data.eval:
        prompts = load_prompts(data.eval, data, tokenizer, config.rollout.max_prompt_tokens)
        found.append(Benchmark(Path(data.eval).stem, prompts))
    for name in config.eval.benchmarks:
        settings = load_benchmark(name)
        own = replace(
            data,
            subset=settings.subset,
            split=settings.split,
            prompt_key=settings.prompt_key,
            answer_key=settings.answer_key,
            context_key=settings.context_key,
        )
        prompts = load_prompts(settings.source, own, tokenizer, config.rollout.max_prompt_tokens)
        found.append(Benchmark(name, prompts, settings.reward))
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two benchmarks are called '{name}': rename the file of data.eval, or list each once")
    most = config.eval.max_prompts or None
    return [replace(benchmark, prompts=benchmark.prompts[:most]) for benchmark in found]

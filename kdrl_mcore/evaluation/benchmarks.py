"""The benchmarks that a run is evaluated on: `data.eval`, and those of `conf/benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdrl_mcore.config import Config, RewardConfig, domain_name, load_benchmark
from kdrl_mcore.data.files import name_of
from kdrl_mcore.data.prompts import load_prompts
from kdrl_mcore.data.sources import columns_of
from kdrl_mcore.data.table import PromptTable
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.reward.golds import check_columns, check_golds
from kdrl_mcore.types import Prompt


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems. `reward` is the kind of their verifier; None means the run's."""

    name: str
    prompts: Sequence[Prompt]
    reward: str | None = None


def load_benchmarks(config: Config, tokenizer: Tokenizer) -> list[Benchmark]:
    """`data.eval`, named after its file or hub id, the held-out prompts of `data.sources` by the domains' names, and
    `eval.benchmarks`, all with the prompt template of `data`.

    Raises:
        ConfigError, DataError: a benchmark is unknown, named twice or cannot be read.
    """
    data, found = config.data, []
    if data.eval:
        prompts = load_prompts(data.eval, data, tokenizer, config.rollout.max_prompt_tokens)
        found.append(Benchmark(name_of(data.eval), prompts))
    for source in data.sources:
        if source.eval:
            prompts = load_prompts(source.eval, columns_of(source, data), tokenizer, config.rollout.max_prompt_tokens)
            found.append(Benchmark(domain_name(source), prompts, source.reward))
    for name in config.eval.benchmarks:
        settings = load_benchmark(name)
        own = replace(
            data,
            subset=settings.subset,
            split=settings.split,
            prompt_key=settings.prompt_key,
            answer_key=settings.answer_key,
            context_key=settings.context_key,
            choices_key=settings.choices_key,
            prompt_pattern=settings.prompt_pattern,
            columns=[],
        )
        prompts = load_prompts(settings.source, own, tokenizer, config.rollout.max_prompt_tokens)
        found.append(Benchmark(name, prompts, settings.reward))
    names = [benchmark.name for benchmark in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two benchmarks are called '{name}': rename the file of data.eval or the domain, or list each once"
            )
    most = config.eval.max_prompts or None
    return [replace(benchmark, prompts=benchmark.prompts[:most]) for benchmark in found]


def check_benchmark(benchmark: Benchmark, kind: str, reward: RewardConfig, *, everything: bool = False) -> None:
    """Check that the verifier `kind` accepts each reference answer (in a large set only a sample, unless `everything`).

    Raises:
        DataError, ConfigError: see `check_golds` and `check_columns`.
    """
    table = benchmark.prompts
    assert isinstance(table, PromptTable)
    check_columns(kind, list(table[0].columns), benchmark.name)
    check_golds(table, benchmark.name, kind, reward, everything=everything)

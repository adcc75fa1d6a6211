"""The data sets that a run trains on: `data.train`, or the domains of `data.sources`, each with its verifier and weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np

from kdrl_mcore.config import Config, DataConfig, SourceConfig, domain_name
from kdrl_mcore.config.derived import (
    is_supervised,
    known_models,
    prompts_of_teachers,
    reads_responses,
    role_of,
    section_of,
    teacher_prompt_tokens,
)
from kdrl_mcore.data.prompts import TeacherPrompts, load_prompts
from kdrl_mcore.data.sharing import once_per_node
from kdrl_mcore.data.stream import Domain
from kdrl_mcore.data.table import PromptTable
from kdrl_mcore.data.taught import teaches
from kdrl_mcore.data.tokenizers import Tokenizer, load_tokenizer
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import config_folder
from kdrl_mcore.reward.golds import check_columns, check_golds
from kdrl_mcore.types import Prompt

_KEYS = ("split", "subset", "prompt_key", "answer_key", "context_key", "choices_key", "response_key", "prompt_pattern")


def load_domains(
    config: Config, tokenizer: Tokenizer, on_chunk: Callable[[], None] = lambda: None, *, all_golds: bool = False
) -> list[Domain]:
    """Load every training set, with its responses where the run uses them, and check that its verifier accepts its
    reference answers. One rank on each machine reads the data and shares it. Collective over the world.

    Args:
        on_chunk: called after each chunk of rows.
        all_golds: check every answer of even a very large set, not only a sample.

    Raises:
        ConfigError: no training set is named, or a reward cannot be used with these columns.
        DataError: see `load_prompts` and `check_golds`.
    """
    sources = training_sources(config)
    tables = once_per_node(lambda: read_domains(config, tokenizer, on_chunk, all_golds=all_golds))
    domains = []
    for (source, _), table in zip(sources, tables, strict=True):
        domains.append(Domain(table.domain, table, source.weight, source.reward or config.reward.kind))
    return domains


def read_domains(
    config: Config, tokenizer: Tokenizer, on_chunk: Callable[[], None] = lambda: None, *, all_golds: bool = False
) -> list[PromptTable]:
    """The prompts of `load_domains`, read by this process without communication."""
    tables, teachers = [], _teacher_prompts(config, tokenizer)
    sft = is_supervised(config.objective)
    for source, data in training_sources(config):
        kind, domain = source.reward or config.reward.kind, domain_name(source) if config.data.sources else ""
        if not sft:
            for each in (kind, *(term.kind for term in config.reward.terms)):
                check_columns(each, data.columns, str(source.path))
        table = load_prompts(
            str(source.path),
            data,
            tokenizer,
            config.rollout.max_prompt_tokens,
            with_targets=reads_responses(config),
            needs_answers=not sft,
            domain=domain,
            long_prompts=data.long_prompts,
            teachers=teachers,
            on_chunk=on_chunk,
        )
        if not sft:
            check_golds(table, str(source.path), kind, config.reward, everything=all_golds)
        tables.append(table)
    return tables


def _teacher_prompts(config: Config, tokenizer: Tokenizer) -> dict[str, TeacherPrompts]:
    """What each teacher reads instead of the student's prompts, by name; without those that read these.

    Args:
        tokenizer: the student's.
    """
    found, prompts = dict[str, TeacherPrompts](), prompts_of_teachers(config)
    models = known_models(config) if prompts else {}
    for name, prompt in prompts.items():
        section = f"{section_of(config, name)}.prompt"
        path = models.get(role_of(name))
        own = tokenizer if path is None else load_tokenizer(config_folder(path))
        key = "rollout.max_prompt_tokens" if prompt.max_tokens is None else f"{section}.max_tokens"
        settings = config.teachers.get(name)
        reads = None if settings is None else partial(teaches, settings)
        found[name] = TeacherPrompts(prompt, section, own, teacher_prompt_tokens(config, name), key, reads)
    return found


def training_sources(config: Config) -> list[tuple[SourceConfig, DataConfig]]:
    """Each training set with the names of its columns.

    Raises:
        ConfigError: there is none.
    """
    data = config.data
    sources = data.sources or ([SourceConfig(path=data.train)] if data.train else [])
    if not sources:
        raise ConfigError("data.train is not set: name a JSONL or parquet file, or a hub id (or several in data.sources)")
    return [(source, columns_of(source, data)) for source in sources]


def reward_kinds(domains: Iterable[Domain]) -> dict[str, str]:
    """The kind of each domain's verifier."""
    return {domain.name: domain.reward for domain in domains}


class HeldOut(Protocol):
    """A benchmark: a named set of problems to evaluate on."""

    @property
    def name(self) -> str:
        """The benchmark's name."""
        ...

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The problems."""
        ...


def data_notes(domains: Sequence[Domain], benchmarks: Sequence[HeldOut]) -> list[str]:
    """Notes on the data for the user, one line each: dropped prompts, repeated prompts, and held-out prompts that are also in
    the training data."""
    lines = []
    tables = [domain.prompts for domain in domains if isinstance(domain.prompts, PromptTable)]
    for table in tables:
        if table.dropped:
            total = len(table) + table.dropped
            lines.append(f"{table.source}: dropped {table.dropped} of {total} prompts, longer than rollout.max_prompt_tokens")
        distinct = len(np.unique(table.questions()))
        if distinct < len(table):
            lines.append(f"{table.source}: {distinct} of its {len(table)} prompts are distinct, the others repeat them")
    for benchmark in benchmarks:
        if not isinstance(benchmark.prompts, PromptTable):
            continue
        questions = benchmark.prompts.questions()
        for table in tables:
            shared = np.flatnonzero(np.isin(questions, table.questions()))
            if len(shared):
                first = benchmark.prompts[int(shared[0])].prompt_id
                lines.append(
                    f"{benchmark.name}: {len(shared)} of its {len(questions)} prompts are also trained on ({table.source}; the "
                    f"first is {first}): on these it measures memorisation"
                )
    return lines


def columns_of(source: SourceConfig, data: DataConfig) -> DataConfig:
    """The names of a training set's columns: its own, and for the others those of `data`."""
    given = {key: getattr(source, key) for key in _KEYS}
    return replace(data, **{key: value for key, value in given.items() if value is not None})

"""Build what a run reads: the tokenizer, the prompts and the evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch.distributed as dist

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import (
    compares_over_vocabulary,
    evaluates,
    has_separate_teacher,
    longest_response,
    replays,
    separate_teachers,
)
from kdrl_mcore.data.limits import Limits, check_prompts, check_teacher_prompts, limits_of
from kdrl_mcore.data.prompts import describe_prompt
from kdrl_mcore.data.sources import data_notes, load_domains, training_sources
from kdrl_mcore.data.stream import Domain
from kdrl_mcore.data.taught import describe_taught
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.data.vocabulary import named_tokens, shared_vocabulary, unshared_tokens
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.evaluation.evaluate import Evaluation
from kdrl_mcore.student.student import Student

logger = logging.getLogger(__name__)

OnPhase = Callable[[str], None]
"""Called with the name of a phase when it begins and whenever it makes progress."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        tokenizer: None only if rollouts are replayed and nothing is evaluated.
        vocab_size: the number of tokens that all models share.
        limits: the models' limits on token ids and lengths.
        domains: the prompts; empty if rollouts are replayed.
        unshared: see `Job`.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    limits: Limits
    domains: list[Domain]
    unshared: Mapping[str, frozenset[int]] = field(default_factory=dict)


def build_training_data(config: Config, on_phase: OnPhase) -> TrainingData:
    """Load the tokenizer and the prompts. Collective over the world.

    Raises:
        ConfigError, DataError, ModelError: they cannot be used, or exceed the models' limits.
    """
    on_phase("load tokenizers")
    assert config.student.path is not None
    teachers = [each.path for each in config.teachers.values()] or [config.teacher.path]
    tokenizer, vocab_size = shared_vocabulary(config.student.path, *teachers, added_may_differ=has_separate_teacher(config))
    unshared = find_unshared(config)
    limits = limits_of(config, vocab_size)
    if tokenizer is None and not replays(config):
        raise ConfigError(f"{config.student.path} has no tokenizer.json, which sampling needs")
    if tokenizer is None and evaluates(config):
        raise ConfigError(f"{config.student.path} has no tokenizer, which data.eval and eval.benchmarks need")
    domains = []
    if tokenizer is not None and not replays(config):
        sources = training_sources(config)
        on_phase("load prompts")
        domains = load_domains(config, tokenizer, partial(on_phase, "load prompts"))
        for (source, _), domain in zip(sources, domains, strict=True):
            check_prompts(domain.prompts, str(source.path), limits, longest_response(config))
            check_teacher_prompts(domain.prompts, str(source.path), config, unshared)
    return TrainingData(tokenizer, vocab_size, limits, domains, unshared)


def find_unshared(config: Config) -> dict[str, frozenset[int]]:
    """By teacher, the student's added tokens at whose ids it has others. Rank 0 says what follows from it.

    Raises:
        ConfigError: the loss compares both models over the vocabulary.
    """
    teachers = {name: each.path for name, each in separate_teachers(config).items() if each.path}
    return {name: frozenset(_unshared_by(config, path)) for name, path in teachers.items()}


def _unshared_by(config: Config, teacher: str) -> dict[int, str]:
    assert config.student.path is not None
    unshared = unshared_tokens(config.student.path, teacher)
    if unshared and compares_over_vocabulary(config.objective):
        first = min(unshared)
        raise ConfigError(
            f"the teacher {teacher} has other added tokens than the student ({len(unshared)}, the first at id "
            f"{first}, {unshared[first]!r}), and objective.kd.estimator={config.objective.kd.estimator} compares the whole "
            "vocabulary (as kd.control_variate does): set it to k1, k2 or k3"
        )
    if unshared and dist.get_rank() == 0:
        logger.warning(
            "the teacher %s has other added tokens at %d ids: a response is distilled up to the first of %s",
            *(teacher, len(unshared), named_tokens(unshared)),
        )
    return unshared


def build_evaluation(config: Config, data: TrainingData, student: Student, on_phase: OnPhase) -> Evaluation | None:
    """The benchmarks, checked against the student's limits; None if nothing is evaluated."""
    on_phase("load evaluation")
    if not evaluates(config):
        return None
    assert data.tokenizer is not None and config.student.path is not None
    limits = Limits.of(student.parts.architecture.vocab_size, [config.student.path])
    return Evaluation(config, data.tokenizer, student.groups, limits)


def describe_data(config: Config, data: TrainingData, evaluation: Evaluation | None) -> None:
    """Log a summary of the data, and one prompt as the models see it.

    Raises:
        DataError: one of several teachers teaches a value that no prompt has.
    """
    benchmarks = [] if evaluation is None else evaluation.benchmarks
    for line in data_notes(data.domains, benchmarks):
        logger.warning("%s", line)
    if data.domains:
        for line in describe_taught(config, [domain.prompts for domain in data.domains]):
            logger.info("%s", line)
    prompts = [*(domain.prompts for domain in data.domains), *(benchmark.prompts for benchmark in benchmarks)]
    if prompts and data.tokenizer is not None:
        logger.info("%s", describe_prompt(prompts[0][0], data.tokenizer))

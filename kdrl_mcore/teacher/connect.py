"""From the configuration to a teacher on servers: where they are, what they must be, and which client asks them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from kdrl_mcore.config import Config, NamedTeacherConfig, TeacherConfig
from kdrl_mcore.config.derived import (
    compares_over_vocabulary,
    prompts_of_teachers,
    replays,
    separate_teachers,
    teacher_prompt_tokens,
)
from kdrl_mcore.convert.fingerprint import weights_fingerprint
from kdrl_mcore.data.tokenizers import Tokenizer
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.parallel.collect import on_first_rank
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.layout import ModelGroups
from kdrl_mcore.teacher.addresses import find_addresses, wait_for_addresses
from kdrl_mcore.teacher.completions import CompletionServers
from kdrl_mcore.teacher.head import top_k_width
from kdrl_mcore.teacher.served import Rows, ServedTeacher
from kdrl_mcore.teacher.servers import Addresses, Expected, ScoringServers
from kdrl_mcore.teacher.state_servers import StateServers

PROBE_TOKENS = 128
"""The tokens that servers score at the start: most of them spread over the vocabulary, and some of the added ones."""
_ADDED = 16

Found = Mapping[str, str | None]
"""The servers' URLs with their tokens."""


def connect_teacher(
    config: Config,
    name: str,
    groups: ModelGroups,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    unshared: Collection[int] = (),
    on_wait: Callable[[], None] = lambda: None,
    on_progress: Callable[[], None] = lambda: None,
) -> ServedTeacher:
    """The teacher of this name, once its servers answer and are the expected teacher. Collective over the world.

    Args:
        groups: the student's.
        tokenizer, vocab_size: the student's tokenizer, and the number of tokens that all models share.
        unshared: the token ids that mean something else to the teacher.
        on_wait: called repeatedly while rank 0 waits for servers that are still starting.
        on_progress: called on every rank while servers score.

    Raises:
        ConfigError, TeacherError: on all ranks; the message names the server and what to change.
    """
    teacher = separate_teachers(config)[name]
    found, weights = on_first_rank(lambda: _wait(config, name, teacher, vocab_size, on_wait))
    own = name if name in prompts_of_teachers(config) else None
    rows = _rows(config, teacher)
    again: Addresses = partial(dict, found) if teacher.server.urls else partial(_present, config, name, teacher, found)
    connect = partial(make_client, config, teacher, again, vocab_size=vocab_size)
    served = ServedTeacher(connect, groups, teacher.server.concurrency, rows, name=own, on_progress=on_progress)
    served.check(expected_of(config, name, tokenizer, vocab_size, unshared, weights))
    return served


def make_client(
    config: Config, teacher: TeacherConfig | NamedTeacherConfig, addresses: Addresses, concurrency: int, vocab_size: int
) -> ScoringServers:
    """A client of a teacher's servers with so many requests in flight on each.

    Args:
        vocab_size: the number of tokens that all models share.
    """
    server, compares = teacher.server, compares_over_vocabulary(config.objective)
    settings: dict[str, Any] = {
        "concurrency": concurrency,
        "attempts": server.attempts,
        "timeout": server.timeout,
        "batch_tokens": server.batch_tokens,
    }
    if server.kind == "hidden_states":
        hidden_size = read_architecture(str(teacher.path)).hidden_size if compares else None
        temperature = config.rollout.temperature
        return StateServers(addresses, temperature=temperature, columns=vocab_size, hidden_size=hidden_size, **settings)
    top_k = config.objective.kd.top_k if compares else 0
    return CompletionServers(addresses, model=server.model, top_k=top_k, **settings)


def expected_of(
    config: Config,
    name: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    unshared: Collection[int],
    weights: str | None,
) -> Expected:
    """What the servers of a teacher must have. Of replayed rollouts the longest is not known here; a server refuses one that it
    cannot read."""
    probe = np.linspace(0, vocab_size - 1, min(vocab_size, PROBE_TOKENS - _ADDED)).round().astype(np.int64)
    added = sorted(() if tokenizer is None else tokenizer.added_ids)
    every = [*probe.tolist(), *(index for index in added if index < vocab_size)]
    ids = [index for index in dict.fromkeys(every) if index not in unshared][:PROBE_TOKENS]
    longest = teacher_prompt_tokens(config, name) + config.rollout.max_response_tokens
    return Expected(
        np.array(ids, dtype=np.int64),
        ["" if tokenizer is None else tokenizer.text_of(index) for index in ids],
        0 if replays(config) else longest,
        weights,
    )


def _wait(
    config: Config, name: str, teacher: TeacherConfig | NamedTeacherConfig, vocab_size: int, on_wait: Callable[[], None]
) -> tuple[Found, str | None]:
    """(the servers, once all of them answer, the fingerprint of the teacher's weights, if they are here)."""
    found = wait_for_addresses(config, name, teacher.server, on_wait)
    client = make_client(config, teacher, partial(dict, found), 1, vocab_size)
    try:
        client.wait(teacher.server.startup_timeout, on_wait)
    finally:
        client.close()
    return found, weights_fingerprint(teacher.path)


def _present(config: Config, name: str, teacher: TeacherConfig | NamedTeacherConfig, found: Found) -> Found:
    """The servers of RUN/teachers now; those of the start, if they are all gone."""
    return find_addresses(config, name, teacher.server) or found


def _rows(config: Config, teacher: TeacherConfig | NamedTeacherConfig) -> Rows | None:
    if not compares_over_vocabulary(config.objective):
        return None
    if teacher.server.kind == "hidden_states":
        return Rows(read_architecture(str(teacher.path)).hidden_size, DTYPES[config.model.dtype])
    return Rows(top_k_width(config.objective.kd), torch.float32)

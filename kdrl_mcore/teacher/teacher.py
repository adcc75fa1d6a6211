"""The teacher: a Megatron model that only scores. It has its own layout, neither optimizer nor gradient buffers, and its
weights can leave the GPU while it is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdrl_mcore.config import ModelConfig, TeacherConfig
from kdrl_mcore.convert.load import load_weights
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.gpt import LanguageModel, build_model
from kdrl_mcore.model.scoring import run_forward, score_rollouts, scoring_plan, span_rows
from kdrl_mcore.parallel.layout import create_scoring_groups, teacher_layout
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.teacher.hidden_states import HiddenStates
from kdrl_mcore.types import Rollout, TokenFloats


@dataclass
class TeacherScores:
    """The teacher's scores of a rollout batch so far, by each response's index in the batch.

    Attributes:
        scored: the number of tokens scored of each response.
        dropped_tokens: further tokens that were scored, whose responses were then dropped from the batch.
        log_probs, entropies: log T of the sampled tokens and the entropies of T [response tokens], 0 for tokens that were not
            scored.
        hidden: the last hidden states, for a divergence over the vocabulary; log-probs and entropies are then computed only if
            token weights need them.
    """

    scored: dict[int, int] = field(default_factory=dict)
    dropped_tokens: int = 0
    log_probs: dict[int, TokenFloats] = field(default_factory=dict)
    entropies: dict[int, TokenFloats] = field(default_factory=dict)
    hidden: HiddenStates | None = None

    @property
    def tokens(self) -> int:
        """The number of response tokens scored."""
        return sum(self.scored.values())

    def keep(self, indices: Sequence[int]) -> None:
        """Drop the scores of all responses but these; those at `indices[i]` become those of response i."""
        log_probs, entropies, hidden = self.log_probs, self.entropies, self.hidden
        self.log_probs = {new: log_probs[old] for new, old in enumerate(indices) if old in log_probs}
        self.entropies = {new: entropies[old] for new, old in enumerate(indices) if old in entropies}
        self.hidden = None if hidden is None else hidden.select(indices)
        before = self.tokens
        self.scored = {new: self.scored[old] for new, old in enumerate(indices) if old in self.scored}
        self.dropped_tokens = before - self.tokens

    def __contains__(self, index: int) -> bool:
        return index in self.log_probs or (self.hidden is not None and index in self.hidden.owner)


class Teacher:
    """Scores given tokens; also serves as the frozen reference model."""

    def __init__(
        self,
        path: str,
        teacher: TeacherConfig,
        model: ModelConfig,
        world_size: int,
        vocab_size: int,
        on_parameter: Callable[[], None] = lambda: None,
        *,
        share_prompts: bool = False,
    ) -> None:
        """Build and load this rank's shard. Collective over the world.

        Args:
            path: an HF model directory.
            vocab_size: the number of tokens of the shared tokenizer; further columns are masked out of the softmax.
            on_parameter: called before each parameter is read.
            share_prompts: compute a prompt once for all responses to it in a micro-batch.
        """
        layout = teacher_layout(world_size, teacher.parallel)
        architecture = read_architecture(path)
        if architecture.vocab_size < vocab_size:
            raise ConfigError(
                f"the teacher {path} has {architecture.vocab_size} vocabulary columns, fewer than the {vocab_size} tokens "
                "it shares with the student"
            )
        self.parts = build_model(
            architecture,
            model,
            create_scoring_groups(layout),
            vocab_size=vocab_size,
            share_prompts=share_prompts,
            trainable=False,
        )
        load_weights(self.parts, path, on_parameter)
        self._offload = teacher.offload and torch.cuda.is_available()
        self._host: dict[torch.nn.Parameter, torch.Tensor] = {}
        if self._offload:
            self._host = {p: p.data.cpu().pin_memory() for p in self.parts.parameters()}
            self._leave_device()

    def hidden_states(
        self, rollouts: Mapping[int, Rollout], *, temperature: float, micro_tokens: int, with_scores: bool = False
    ) -> tuple[HiddenStates, list[tuple[TokenFloats, TokenFloats]]]:
        """The last hidden states of these rollouts (by their index), for a divergence over the vocabulary, and on request
        the results of `scores` from the same pass. Collective over the world."""
        indices, wanted = list(rollouts), list(rollouts.values())
        layout, leader = self.parts.groups.layout, self.parts.groups.is_replica_leader
        local: dict[int, Tensor] = {}

        def keep(_: LanguageModel, batch: PackedBatch, hidden_SH: Tensor) -> list[None]:
            if leader:
                states = hidden_SH[batch.rows_T].cpu()
                local.update((indices[span.rollout], states[rows]) for span, rows in span_rows(batch.spans))
            return []

        scored: list[tuple[TokenFloats, TokenFloats]] = []
        with self._on_device():
            if with_scores:
                scored = score_rollouts(self.parts, wanted, temperature=temperature, micro_tokens=micro_tokens, on_hidden=keep)
            elif wanted:
                run_forward(self.parts, wanted, micro_tokens, keep)
        plan = scoring_plan(self.parts, wanted, micro_tokens)
        owner = {
            indices[item]: layout.rank(pipeline=layout.pipeline - 1, data=data)
            for data, batches in enumerate(plan)
            for items in batches
            for item in items
        }
        return HiddenStates(self.parts.config.hidden_size, self.parts.config.params_dtype, owner, local), scored

    def score(self, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int) -> list[TokenFloats]:
        """log T(o_t | s_t) [response tokens] for each rollout, on every rank. Collective over the world."""
        return [log_probs for log_probs, _ in self.scores(rollouts, temperature=temperature, micro_tokens=micro_tokens)]

    def scores(
        self, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int
    ) -> list[tuple[TokenFloats, TokenFloats]]:
        """log T(o_t | s_t) and the entropy of T( . | s_t) [response tokens] for each rollout, on every rank. Collective over
        the world."""
        if not rollouts:
            return []
        with self._on_device():
            return score_rollouts(self.parts, rollouts, temperature=temperature, micro_tokens=micro_tokens)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        for parameter, host in self._host.items():
            parameter.data = host.to(device(), non_blocking=True)
        try:
            yield
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        for parameter, host in self._host.items():
            parameter.data = host

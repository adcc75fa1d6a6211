"""The teacher: a Megatron model that only scores. It has its own layout, neither optimizer nor gradient buffers, and its
weights can leave the GPU while it is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from kdrl_mcore.config import ModelConfig, NamedTeacherConfig, TeacherConfig
from kdrl_mcore.convert.load import load_weights
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.gpt import LanguageModel, build_model
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.parallel.layout import create_scoring_groups, teacher_layout
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.teacher.scores import TeacherScores
from kdrl_mcore.teacher.source import as_read, score_with
from kdrl_mcore.types import Rollout, TokenFloats


class Teacher:
    """Scores given tokens; also serves as the frozen reference model."""

    def __init__(
        self,
        path: str,
        teacher: TeacherConfig | NamedTeacherConfig,
        model: ModelConfig,
        world_size: int,
        vocab_size: int,
        on_parameter: Callable[[], None] = lambda: None,
        *,
        share_prompts: bool = False,
        name: str | None = None,
    ) -> None:
        """Build and load this rank's shard. Collective over the world.

        Args:
            path: an HF model directory.
            vocab_size: the number of tokens of the shared tokenizer; the softmax excludes columns beyond it.
            on_parameter: called before each parameter is read.
            share_prompts: compute a prompt once for all responses to it in a micro-batch.
            name: which of `Rollout.teacher_prompts` it reads; None for the student's prompts.
        """
        self._name = name
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

    @property
    def chunks(self) -> Sequence[LanguageModel]:
        """The models of this rank."""
        return self.parts.chunks

    def scores_of(
        self, rollouts: Mapping[int, Rollout], wanted: frozenset[str], *, temperature: float, micro_tokens: int
    ) -> TeacherScores:
        """See `ScoreSource`."""
        rollouts = as_read(rollouts, self._name)
        with self._on_device():
            return score_with(self.parts, rollouts, wanted, temperature=temperature, micro_tokens=micro_tokens)

    def score(self, rollouts: Sequence[Rollout], *, temperature: float, micro_tokens: int) -> list[TokenFloats]:
        """log T(o_t | s_t) [response tokens] for each rollout, on every rank. Collective over the world."""
        if not rollouts:
            return []
        with self._on_device():
            scored = score_rollouts(self.parts, rollouts, temperature=temperature, micro_tokens=micro_tokens)
        return [log_probs for log_probs, _ in scored]

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

"""The teacher's output head in the student's layout, for divergences that compare both models over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig
from kdrl_mcore.convert.load import load_head
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.vocab_parallel import (
    ClippedForwardKL,
    ExactForwardKL,
    ExactReverseKL,
    JensenShannon,
    TeacherInputs,
    TopKForwardKL,
    TopKJensenShannon,
    TopKReverseKL,
    TopKUnbiased,
    VocabShard,
)
from kdrl_mcore.vocab_parallel.divergence import Divergence
from kdrl_mcore.vocab_parallel.top_k import Support, Tail


def divergence_of(kd: DistillationConfig, sampler_log_probs_T: Tensor | None) -> Divergence:
    """The divergence of an estimator that compares over the vocabulary, or that of a control variate.

    Args:
        sampler_log_probs_T: log mu of a micro-batch's loss rows; None if the student's present weights sampled them.
    """
    support, tail = cast(Support, kd.top_k_support), cast(Tail, kd.top_k_tail)
    if kd.estimator == "top_k_unbiased":
        return TopKUnbiased(kd.top_k, sampler_log_probs_T)
    if kd.estimator == "top_k":
        if kd.divergence == "jsd":
            return TopKJensenShannon(kd.top_k, support, tail, kd.jsd_beta)
        form = TopKForwardKL if kd.divergence == "forward" else TopKReverseKL
        return form(kd.top_k, support, tail)
    if kd.divergence == "jsd":
        return JensenShannon(kd.jsd_beta)
    if kd.entry_clip is not None:
        return ClippedForwardKL(kd.entry_clip)
    return ExactForwardKL() if kd.divergence == "forward" else ExactReverseKL()


class TeacherHead:
    """This rank's columns of the teacher's head, in the student's vocab-parallel layout, which need not be the teacher's."""

    def __init__(self, weight_VG: Tensor, shard: VocabShard, kd: DistillationConfig) -> None:
        """Args:
            weight_VG: this rank's columns.

        Raises:
            ConfigError: `objective.kd.top_k` exceeds the vocabulary.
        """
        if kd.estimator in ("top_k", "top_k_unbiased") and not 1 <= kd.top_k <= shard.size:
            raise ConfigError(f"objective.kd.top_k={kd.top_k} must be between 1 and the {shard.size} tokens of the vocabulary")
        self.weight_VG = weight_VG
        self._kd = kd

    @staticmethod
    def read(paths: Sequence[str], shard: VocabShard, dtype: str, kd: DistillationConfig) -> TeacherHead:
        """The columns from the teacher's directory; of several teachers side by side, as their hidden states are
        (`hidden_states.JoinedStates`). Raises as the constructor does."""
        weights = [load_head(path, shard.start, shard.real_columns, DTYPES[dtype]).to(device()) for path in paths]
        return TeacherHead(weights[0] if len(weights) == 1 else torch.cat(weights, dim=1), shard, kd)

    def inputs(self, hidden_DG: Tensor, sampler_log_probs_T: Tensor | None) -> TeacherInputs:
        """The teacher's side of `fused_head` for one micro-batch. No communication.

        Args:
            hidden_DG: the teacher's last hidden states of the first D of the T loss rows.
            sampler_log_probs_T: log mu of the targets; None if the student's present weights sampled them.
        """
        with_entropy = self._kd.mix == "entropy" or ":" in self._kd.mix
        return TeacherInputs(hidden_DG, self.weight_VG, divergence_of(self._kd, sampler_log_probs_T), with_entropy)

"""The teacher's output head beside the student's: the divergences that compare both models over the vocabulary."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdrl_mcore.config import DistillationConfig
from kdrl_mcore.convert.load import load_head
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.gpt import DTYPES
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.vocab_parallel import (
    HeadOutputs,
    VocabShard,
    fused_exact_reverse_kl,
    fused_top_k_reverse_kl,
    fused_top_k_unbiased,
)

OVER_THE_VOCABULARY = ("exact", "top_k", "top_k_unbiased")
"""The estimators that need the teacher's distribution, not only its log-probs of the sampled tokens."""


class TeacherHead:
    """This rank's columns of the teacher's head, in the student's vocab-parallel layout whatever the teacher's own is."""

    def __init__(self, path: str, shard: VocabShard, dtype: str, kd: DistillationConfig) -> None:
        """Read the columns from the teacher's directory.

        Raises:
            ConfigError: `objective.kd.top_k` exceeds the vocabulary.
        """
        if kd.estimator != "exact" and not 1 <= kd.top_k <= shard.size:
            raise ConfigError(f"objective.kd.top_k={kd.top_k} must be between 1 and the {shard.size} tokens of the vocabulary")
        self.weight_VG = load_head(path, shard.start, shard.real_columns, DTYPES[dtype]).to(device())
        self._kd = kd

    def compare(self, hidden_DG: Tensor, sampler_log_probs_T: Tensor | None, **head: Any) -> HeadOutputs:
        """The pass over both heads that `objective.kd.estimator` names; `head` are the arguments of `fused_head`.

        Collectives: those of `fused_exact_reverse_kl` or its top-k sisters.
        """
        both: dict[str, Any] = {**head, "teacher_hidden_DG": hidden_DG, "teacher_weight_VG": self.weight_VG}
        if self._kd.estimator == "exact":
            return fused_exact_reverse_kl(**both)
        if self._kd.estimator == "top_k":
            both |= {"support": self._kd.top_k_support, "tail": self._kd.top_k_tail}
            return fused_top_k_reverse_kl(**both, top_k=self._kd.top_k)
        assert self._kd.estimator == "top_k_unbiased"
        return fused_top_k_unbiased(**both, top_k=self._kd.top_k, sampler_log_probs_T=sampler_log_probs_T)

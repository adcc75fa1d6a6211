"""Exact log-probs, entropies, divergences and losses over a vocabulary split across tensor-parallel ranks."""

from kdrl_mcore.vocab_parallel.chunk import HeadTokens, TokenLoss
from kdrl_mcore.vocab_parallel.divergence import TeacherInputs
from kdrl_mcore.vocab_parallel.engine import HeadOutputs
from kdrl_mcore.vocab_parallel.exact import ClippedForwardKL, ExactForwardKL, ExactReverseKL, JensenShannon
from kdrl_mcore.vocab_parallel.head import fused_head, head_log_probs
from kdrl_mcore.vocab_parallel.logits import token_log_probs_and_entropy
from kdrl_mcore.vocab_parallel.shard import VocabShard
from kdrl_mcore.vocab_parallel.top_k import KnownTopK, TopKForwardKL, TopKJensenShannon, TopKReverseKL, TopKUnbiased

__all__ = [
    "ClippedForwardKL",
    "ExactForwardKL",
    "ExactReverseKL",
    "HeadOutputs",
    "HeadTokens",
    "JensenShannon",
    "KnownTopK",
    "TeacherInputs",
    "TokenLoss",
    "TopKForwardKL",
    "TopKJensenShannon",
    "TopKReverseKL",
    "TopKUnbiased",
    "VocabShard",
    "fused_head",
    "head_log_probs",
    "token_log_probs_and_entropy",
]

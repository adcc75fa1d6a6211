"""Exact log-probs, entropies, divergences and losses over a vocabulary that tensor-parallel ranks share."""

from kdrl_mcore.vocab_parallel.divergence import fused_exact_reverse_kl
from kdrl_mcore.vocab_parallel.engine import HeadOutputs
from kdrl_mcore.vocab_parallel.head import fused_head, head_log_probs
from kdrl_mcore.vocab_parallel.logits import token_log_probs_and_entropy
from kdrl_mcore.vocab_parallel.shard import VocabShard
from kdrl_mcore.vocab_parallel.top_k import fused_top_k_reverse_kl, fused_top_k_unbiased

__all__ = [
    "HeadOutputs",
    "VocabShard",
    "fused_exact_reverse_kl",
    "fused_head",
    "fused_top_k_reverse_kl",
    "fused_top_k_unbiased",
    "head_log_probs",
    "token_log_probs_and_entropy",
]

"""Exact log-probs, entropies and losses over a vocabulary that tensor-parallel ranks share."""

from kdrl_mcore.vocab_parallel.head import fused_head, head_log_probs
from kdrl_mcore.vocab_parallel.shard import VocabShard

__all__ = ["VocabShard", "fused_head", "head_log_probs"]

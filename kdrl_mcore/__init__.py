"""kdrl_mcore: a Megatron-Core trainer for KDRL, distillation and reinforcement learning in one loss (arXiv 2506.02208)."""

__version__ = "0.2.0"

"""The floating-point operations that training a model needs (without recomputation and padding), and the peak rate of the
GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from omegaconf import OmegaConf

from kdrl_mcore.config import ClusterConfig, conf_dir
from kdrl_mcore.model.families.base import Architecture


def layer_matrices(architecture: Architecture) -> int:
    """Elements of the matrices that a token is multiplied with in one layer, counting only the experts it is routed to."""
    a = architecture
    attention = a.hidden_size * a.head_dim * 2 * (a.num_attention_heads + a.num_key_value_heads)
    if a.experts is None:
        return attention + 3 * a.hidden_size * a.ffn_hidden_size
    router = a.hidden_size * a.experts.count
    return attention + router + 3 * a.hidden_size * a.experts.ffn_hidden_size * a.experts.per_token


def training_flop(architecture: Architecture, sequences: Iterable[tuple[int, int, int]]) -> float:
    """FLOP of one forward and backward pass over sequences given as (tokens, loss rows, tokens before them in a shared prompt).

    Each token costs two FLOP per matrix element forward, and twice that backward (arXiv 2001.08361). Causal attention's two
    products count half of the square, and the output head counts only loss rows.
    """
    a = architecture
    total = 0.0
    for tokens, rows, shared in sequences:
        attended = tokens * (tokens + 2 * shared)
        layers = layer_matrices(a) * tokens + a.num_attention_heads * a.head_dim * attended
        total += a.num_layers * layers + a.hidden_size * a.vocab_size * rows
    return 6 * total


@cache
def known_peak_tflops(gpu: str) -> float:
    """Dense bfloat16 TFLOP/s of a GPU by its CUDA name, from `conf/cluster`; 0 where no cluster there matches."""
    words = set(gpu.replace("-", " ").lower().split())
    for path in sorted((conf_dir() / "cluster").glob("*.yaml")):
        if path.stem in words:
            return float(OmegaConf.to_container(OmegaConf.load(path))["peak_tflops"])  # type: ignore[call-overload, index]
    return 0.0


def peak_tflops(cluster: ClusterConfig) -> float:
    """Dense bfloat16 TFLOP/s of this rank's GPU: from the configuration, else by the GPU's name; 0 if unknown."""
    if cluster.peak_tflops or not torch.cuda.is_available():
        return cluster.peak_tflops
    return known_peak_tflops(torch.cuda.get_device_name())

"""The floating-point operations that training a model needs (without recomputation and padding), and the peak rate of the
GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from omegaconf import OmegaConf

from kdrl_mcore.config import ClusterConfig, conf_dir
from kdrl_mcore.model.families.base import Architecture


def layer_matrices(architecture: Architecture, layer: int) -> int:
    """Elements of the matrices that a token is multiplied with in a layer (from 0), counting only experts it is routed to."""
    a = architecture
    attention = a.hidden_size * a.head_dim * 2 * (a.num_attention_heads + a.num_key_value_heads)
    router = a.hidden_size * a.experts.count if a.experts is not None and a.has_experts(layer) else 0
    return attention + router + 3 * a.hidden_size * a.active_ffn_size(layer)


def training_flop(architecture: Architecture, sequences: Iterable[tuple[int, int, int]], *, frozen: bool = False) -> float:
    """FLOP of one forward and backward pass over sequences given as (tokens, loss rows, tokens before them in a shared prompt).

    Each token costs two FLOP per matrix element forward, and twice that backward (arXiv 2001.08361). Causal attention's two
    products count half of the square (or the windows in it), and the output head counts only loss rows.

    Args:
        frozen: adapters are trained, which do not count, and no gradient of a matrix is computed.
    """
    a = architecture
    of_matrices = of_attention = 0.0
    matrices = sum(layer_matrices(a, layer) for layer in range(a.num_layers))
    for tokens, rows, shared in sequences:
        attended = sum(_attended(tokens, shared, a.attention(layer).window) for layer in range(a.num_layers))
        of_matrices += matrices * tokens + a.hidden_size * a.vocab_size * rows
        of_attention += a.num_attention_heads * a.head_dim * attended
    return (4 if frozen else 6) * of_matrices + 6 * of_attention


def _attended(tokens: int, shared: int, window: int | None) -> int:
    """Twice the number of keys that the tokens see: all those before them, or a window of them."""
    growing = tokens if window is None else min(tokens, max(0, window - shared))  # tokens whose window is not full yet
    return growing * (growing + 2 * shared) + 2 * (window or 0) * (tokens - growing)


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

"""From token losses to the batch loss: L = sum_i weight_i sum_t loss_it. Sums are divided here and nowhere else.

Lengths are those of the whole global batch, over every data-parallel rank and micro-batch, so that the same data give the
same loss in any layout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_weights(lengths_N: Tensor, aggregation: str, max_response_tokens: int, dropped_N: Tensor | None = None) -> Tensor:
    """The weight of each token of response i [N], float64.

    `token_mean`: 1 / (number of all tokens). `sequence_mean`: 1 / (N length_i). `sequence_sum_norm`:
    1 / (N max_response_tokens).

    Args:
        dropped_N: responses (bool) that are left out, of the sums and of the normaliser.
    """
    if dropped_N is None or not dropped_N.any():
        return _weights(lengths_N, torch.ones_like(lengths_N, dtype=torch.bool), aggregation, max_response_tokens)
    return torch.where(dropped_N, 0.0, _weights(lengths_N, ~dropped_N, aggregation, max_response_tokens))


def distillation_weights(
    lengths_N: Tensor, distil_N: Tensor, aggregation: str, max_response_tokens: int, denominator: str
) -> Tensor:
    """`response_weights` for the distillation loss: zero for masked responses.

    Args:
        distil_N: which responses are distilled (bool).
        denominator: `all` divides by all responses, so that masking does not raise the effective beta; `unmasked` divides
            by the distilled ones only.
    """
    counted_N = torch.ones_like(distil_N) if denominator == "all" else distil_N
    return torch.where(distil_N, _weights(lengths_N, counted_N, aggregation, max_response_tokens), 0.0)


def _weights(lengths_N: Tensor, counted_N: Tensor, aggregation: str, max_response_tokens: int) -> Tensor:
    lengths_N = lengths_N.double()
    num_sequences = counted_N.sum().clamp(min=1)
    if aggregation == "token_mean":
        total = lengths_N[counted_N].sum().clamp(min=1)
        return (1.0 / total).expand(len(lengths_N)).clone()
    if aggregation == "sequence_mean":
        return 1.0 / (num_sequences * lengths_N.clamp(min=1))
    if aggregation == "sequence_sum_norm":
        return (1.0 / (num_sequences.double() * max_response_tokens)).expand(len(lengths_N)).clone()
    raise ValueError(f"aggregation must be token_mean, sequence_mean or sequence_sum_norm, not {aggregation}")

"""How the sampled reverse KL and a divergence over the vocabulary are mixed for each token.

A rule gives each token a pair, the share of k2 of the sampled token and that of the divergence; none has a gradient. T response
tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_mcore.config import DistillationConfig

Shares = tuple[Tensor, Tensor]
Rule = Callable[[Tensor, Tensor | None, Tensor | None, DistillationConfig], Shares]
"""(d = log T - log pi, the teacher's entropies, numbers drawn from [0, 1), settings) -> shares; all [T]. Entropies and draws
are None if the settings do not need them, or no token of the batch has a teacher."""


def entropy(d_T: Tensor, entropies_T: Tensor | None, draws_T: Tensor | None, kd: DistillationConfig) -> Shares:
    """k2 everywhere, and the divergence where the teacher's entropy is above `mix_above`: EOPD, arXiv 2603.07079, whose sampled
    part is k1 inside the clipped surrogate (`placement=advantage`)."""
    unsure_T = torch.zeros_like(d_T) if entropies_T is None else (entropies_T > kd.mix_above).to(d_T)
    return torch.ones_like(d_T), unsure_T


def trust(d_T: Tensor, entropies_T: Tensor | None, draws_T: Tensor | None, kd: DistillationConfig) -> Shares:
    """t and 1 - t, t = min(T / pi, 1): TrOPD, arXiv 2606.01249, in expectation over the draw of `drawn_trust`. Its gradient
    differs from the reverse KL's by 0.73 of that gradient's norm, with 0.19 of k2's variance (`test_axes_expectation.py`)."""
    trust_T = d_T.exp().clamp(max=1.0)
    return trust_T, 1 - trust_T


def drawn_trust(d_T: Tensor, entropies_T: Tensor | None, draws_T: Tensor | None, kd: DistillationConfig) -> Shares:
    """One of the two for each token, k2 with probability t = min(T / pi, 1): TrOPD, arXiv 2606.01249. The expected gradient is
    that of `trust`, its variance 1.5 times as large in the same setting."""
    assert draws_T is not None
    trusted_T = (draws_T < d_T.exp().clamp(max=1.0)).to(d_T)
    return trusted_T, 1 - trusted_T


MIXES: dict[str, Rule] = {rule.__name__: rule for rule in (entropy, trust, drawn_trust)}
"""The rules by the names of `objective.kd.mix`."""

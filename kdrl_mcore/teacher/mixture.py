"""The mixture of several teachers' distributions T_k of one prompt, with portions a_k that sum to 1 (docs/method.md).

geometric: log G = sum_k a_k log T_k - log Z. From log-probs of single tokens log Z is unknown: `geometric` leaves it out, which
    changes neither the expected gradient of k1 nor, on-policy, that of k2, as it does not depend on the token.
arithmetic: log M = log sum_k a_k T_k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdrl_mcore.types import TokenFloats


def portions(shares: Mapping[str, float]) -> dict[str, float]:
    """a_k, each teacher's part of the sum of all shares, which must be positive."""
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def geometric(log_probs: Sequence[TokenFloats], parts: Sequence[float]) -> TokenFloats:
    """sum_k a_k log T_k of each token [T], in float32."""
    return np.asarray(sum(a * each.astype(np.float64) for a, each in zip(parts, log_probs, strict=True)), np.float32)


def arithmetic(log_probs: Sequence[TokenFloats], parts: Sequence[float]) -> TokenFloats:
    """log sum_k a_k T_k of each token [T], in float32."""
    terms = [np.log(a) + each.astype(np.float64) for a, each in zip(parts, log_probs, strict=True)]
    return np.logaddexp.reduce(np.stack(terms), axis=0).astype(np.float32)


MIXTURES: dict[str, Callable[[Sequence[TokenFloats], Sequence[float]], TokenFloats]] = {
    "geometric": geometric,
    "arithmetic": arithmetic,
}
"""The mixtures of log-probs by the names of `objective.kd.mixture`."""

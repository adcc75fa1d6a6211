"""Sampled estimators of the reverse KL, KL(pi || T), per token of the student's own responses.

d = log T(o_t|s_t) - log pi(o_t|s_t); w = pi / mu, the importance weight of a token that mu sampled. See
http://joschu.net/blog/kl-approx.html for the names k1, k2 and k3.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def log_ratio(teacher_log_probs_T: Tensor, log_probs_T: Tensor, clamp: float | None) -> Tensor:
    """d, clamped to [-clamp, clamp] unless `clamp` is None (a clamped token has no gradient)."""
    d_T = teacher_log_probs_T - log_probs_T
    return d_T if clamp is None else d_T.clamp(-clamp, clamp)


def importance_weight(log_probs_T: Tensor, sampler_log_probs_T: Tensor) -> Tensor:
    """w = pi / mu, differentiable in the student's log-probs."""
    return (log_probs_T - sampler_log_probs_T).exp()


def on_policy_weight(log_probs_T: Tensor, estimator: str) -> Tensor:
    """w = 1, for tokens sampled by the student's present weights. For k1 it carries the gradient of log pi, the only one
    that k1 has, and for a user's function. For k2 and k3 it is a constant, the paper's form, so k3 has the biased
    gradient of the paper's ablation."""
    w_T = (log_probs_T - log_probs_T.detach()).exp()
    return w_T.detach() if estimator in ("k2", "k3") else w_T


def k1(d_T: Tensor, w_T: Tensor) -> Tensor:
    """-w sg(d): value and gradient unbiased. w must be differentiable: with a detached w the expected gradient is zero."""
    return -w_T * d_T.detach()


def k2(d_T: Tensor, w_T: Tensor) -> Tensor:
    """sg(w) d^2 / 2, the paper's estimator: gradient unbiased, value biased. w is detached."""
    return 0.5 * w_T.detach() * d_T.square()


def k3(d_T: Tensor, w_T: Tensor) -> Tensor:
    """w (exp(d) - 1 - d): value unbiased. On-policy, with w = 1, its gradient (1 - exp(d)) grad log pi is that of the forward
    KL, which differs from the reverse KL's by 0.73 of its norm (`test_axes_expectation.py`). Off-policy, with a differentiable
    w, the gradient is -w d grad log pi, unbiased like k2's."""
    return w_T * (d_T.expm1() - d_T)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""The estimators by the names that `objective.kd.estimator` uses: (d, w) -> term of each token; all [T]."""

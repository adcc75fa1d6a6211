"""What is learned from sampled sequences, as an exact expectation: every sequence of a small policy, weighted by the sampler
mu.

With corrections of single tokens the prefixes are still distributed as under mu; corrections of whole sequences change that,
and the cost of their bounds is stated here and in docs/method.md. P prefixes, V tokens, length L, N = V^L sequences.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_mcore.config import load_config
from kdrl_mcore.objective.joint import TokenBatch, joint_loss

V, L = 4, 3
SEQUENCES = list(product(range(V), repeat=L))
PREFIXES = {prefix: row for row, prefix in enumerate(p for length in range(L) for p in product(range(V), repeat=length))}
random = torch.Generator().manual_seed(5)
Z, TEACHER, OLDER = (torch.randn(len(PREFIXES), V, generator=random, dtype=torch.float64) * scale for scale in (1, 1, 0.5))
REWARDS_N = torch.rand(len(SEQUENCES), generator=random, dtype=torch.float64)
ROWS_NL = torch.tensor([[PREFIXES[one[:t]] for t in range(L)] for one in SEQUENCES])
TOKENS_NL = torch.tensor(SEQUENCES)


def log_probs(logits_PV: Tensor) -> Tensor:
    """The log-probs of the tokens of every sequence [N, L]."""
    return logits_PV.log_softmax(1)[ROWS_NL, TOKENS_NL]


MU_NL, PI_NL = log_probs(Z + OLDER), log_probs(Z)
MU_N, PI_N = MU_NL.sum(1).exp(), PI_NL.sum(1).exp()
ADVANTAGES_N = REWARDS_N - (PI_N * REWARDS_N).sum()


def gradient(settings: str, *, alpha: float, beta: float, **more: Any) -> Tensor:
    """The expected gradient [P, V] with respect to the logits, for sequences that mu sampled; `more` are [N] or [N, L]."""
    objective = load_config(
        ["objective=kdrl", "student.path=s", "teacher.path=t", "rollout=replay", "rollout.path=r", *settings.split()]
    ).objective
    z = Z.clone().requires_grad_()

    def spread(values: Tensor) -> Tensor:
        return values.flatten() if values.dim() == 2 else values.repeat_interleave(L)

    batch = TokenBatch(
        advantages=spread(ADVANTAGES_N),
        policy_weights=spread(MU_N),
        distillation_weights=spread(MU_N),
        sampler_log_probs=MU_NL.flatten(),
        teacher_log_probs=log_probs(TEACHER).flatten(),
        **{name: spread(value) for name, value in more.items()},
    )
    loss, _, _ = joint_loss(log_probs(z).flatten(), batch, objective, alpha, beta)
    return torch.autograd.grad(loss.sum(), z)[0]


def policy_gradient() -> Tensor:
    """-E_pi[A sum_t grad log pi]."""
    z = Z.clone().requires_grad_()
    return torch.autograd.grad(-(log_probs(z).sum(1).exp() * ADVANTAGES_N).sum(), z)[0]


def distillation_gradient() -> Tensor:
    """The gradient of the reverse KL at each prefix, with the prefixes weighted by pi."""
    z = Z.clone().requires_grad_()
    reach_P = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for one, p in zip(SEQUENCES, PI_N.tolist(), strict=True):
        for t in range(L):
            reach_P[PREFIXES[one[:t]]] += p
    log_p, log_q = z.log_softmax(1), TEACHER.log_softmax(1)
    return torch.autograd.grad((reach_P * (log_p.exp() * (log_p - log_q)).sum(1)).sum(), z)[0]


def bias(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def correction(words: str) -> Tensor:
    """The policy gradient with a correction for the sampler: pi_old is pi."""
    key = "objective.sampler_correction"
    kind, level, bound = words.split()
    mean = L if level == "geometric" else 1
    ratios = {} if level == "token" else {"sequence_log_ratios": (PI_NL - MU_NL).sum(1) / mean}
    settings = f"objective=grpo {key}.kind={kind} {key}.level={level} {key}.bound={bound}"
    return gradient(settings, alpha=1.0, beta=0.0, **ratios)


def importance(words: str) -> Tensor:
    """The gradient of distillation with k2 and weights pi / mu."""
    kind, level, bound = words.split()
    mean = L if level == "geometric" else 1
    ratios = {} if level == "token" else {"kd_log_ratios": (PI_NL - MU_NL).sum(1) / mean}
    settings = f"objective.kd.importance={kind} objective.kd.importance_level={level} objective.kd.importance_bound={bound}"
    return gradient(settings, alpha=0.0, beta=1.0, **ratios)


CORRECTIONS = {
    "truncate token 1e6": 0.52,
    "truncate token 1.2": 0.522,
    "mask token 1.2": 0.774,
    "truncate sequence 1e6": 0,
    "truncate sequence 2": 0.062,
    "mask sequence 2": 0.481,
    "mask geometric 1.2": 0.483,
}
IMPORTANCE = {
    "full token 2": 0.203,
    "truncate token 1.2": 0.211,
    "mask token 1.2": 0.545,
    "full sequence 2": 0,
    "truncate sequence 2": 0.059,
    "mask sequence 2": 0.235,
    "mask geometric 1.2": 0.328,
}


@pytest.mark.parametrize("words", CORRECTIONS)
def test_the_bias_of_a_correction_of_the_policy_loss(words: str) -> None:
    assert bias(correction(words), policy_gradient()) == pytest.approx(CORRECTIONS[words], abs=0.002)


def test_without_a_correction_the_policy_gradient_is_mus() -> None:
    assert bias(gradient("objective=grpo", alpha=1.0, beta=0.0), policy_gradient()) == pytest.approx(0.569, abs=0.002)


@pytest.mark.parametrize("words", IMPORTANCE)
def test_the_bias_of_weights_of_distillation(words: str) -> None:
    assert bias(importance(words), distillation_gradient()) == pytest.approx(IMPORTANCE[words], abs=0.002)


RATIOS = {
    "objective.ratio=token": 0.52,
    "objective.ratio=sequence": 0.368,
    "objective.policy_loss=cispo": 0.52,
    "objective.ratio=sequence objective.policy_loss=cispo": 0.368,
    "objective.ratio=product": 0,
}


@pytest.mark.parametrize("settings", RATIOS)
def test_the_bias_of_a_ratio_to_the_old_policy_before_it_is_clipped(settings: str) -> None:
    """mu is pi_old, and no bound is reached."""
    log_ratios_NL, more = PI_NL - MU_NL, dict[str, Tensor]()
    if "ratio=sequence" in settings or "product" in settings:
        more = {"sequence_ratios": (log_ratios_NL.sum(1) if "product" in settings else log_ratios_NL.mean(1)).exp()}
    wide = "objective=grpo objective.clip_high=1e6" + ("" if "cispo" in settings else " objective.clip_low=1")
    found = gradient(f"{wide} {settings}", alpha=1.0, beta=0.0, old_log_probs=MU_NL, **more)
    assert bias(found, policy_gradient()) == pytest.approx(RATIOS[settings], abs=0.002)

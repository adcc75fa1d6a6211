"""How the two signals of a token combine: the advantage A and the teacher's log-ratio d = log T - log pi.

A rule gives each token a pair, the coefficient a of the policy loss and the weight b of its distillation. The loss is alpha *
policy_loss(a) * correction + beta * b * token_weight * divergence. `ratio` instead changes what the policy is compared with
(`anchor`), and `reference` has a coefficient for the KL to the initial student (`reference_coefficient`).

T response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdrl_mcore.config import CombineConfig


@dataclass(frozen=True)
class Signals:
    """The inputs of a rule for each token, [T] each, without gradients.

    Attributes:
        advantages: A of the token's response.
        correct: whether the response is correct (bool).
        log_ratio: d, 0 where the response is not distilled.
        distilled: whether the response is distilled (bool).
    """

    advantages: Tensor
    correct: Tensor
    log_ratio: Tensor
    distilled: Tensor

    def sign(self, signal: str) -> Tensor:
        """s [T]: 1 or -1 by the verdict; or the sign of A, which is 0 in a group of equal rewards."""
        if signal == "advantage":
            return self.advantages.sign()
        return torch.where(self.correct, 1.0, -1.0).to(self.log_ratio)


Pair = tuple[Tensor, Tensor | None]
"""(a, b) [T]; b is None where it is 1."""


def add(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(A, 1): KDRL, arXiv 2506.02208."""
    return signals.advantages, None


def gate(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """((1 - z) A, z), z = 1 where the response is incorrect and distilled: SRPO, arXiv 2604.02288. An incorrect response
    that the mask excludes keeps its policy loss."""
    gated_T = signals.distilled & ~signals.correct
    return torch.where(gated_T, 0.0, signals.advantages), gated_T.to(signals.log_ratio)


def sign(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(A, g), g = `agree` where sign d = s, else `differ`. Our reconstruction of SG-OPD, arXiv 2606.09304, which scales by 1.8
    and 1.0."""
    agrees_T = signals.log_ratio.sign() == signals.sign(settings.signal)
    return signals.advantages, torch.where(agrees_T, settings.agree, settings.differ).to(signals.log_ratio)


def relu(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(0, 1[s d > 0]): the teacher counts where it agrees with the verdict, so log pi has the coefficient s relu(s d). OPDVR,
    arXiv 2608.24696. With the sign of A as s it is GRPD, in which groups of equal rewards have no gradient."""
    agrees_T = signals.log_ratio * signals.sign(settings.signal) > 0
    return torch.zeros_like(signals.advantages), agrees_T.to(signals.log_ratio)


def modulate(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(m A, 0), m = (1 - beta) + beta clip(exp(sign(A) d), 1 - clip, 1 + clip): RLSD, arXiv 2604.03128, beta annealed to 0. The
    paper has the clip with both bounds and with only the upper one (`bounds`)."""
    m_T = (signals.advantages.sign() * signals.log_ratio).exp()
    m_T = m_T.clamp(0.0 if settings.bounds == "upper" else 1 - settings.clip, 1 + settings.clip)
    return ((1 - beta) + beta * m_T) * signals.advantages, torch.zeros_like(signals.log_ratio)


def ratio(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(A, 0): the teacher is in the policy ratio, see `anchor`. TRRD (RLAD), arXiv 2602.22495."""
    return signals.advantages, torch.zeros_like(signals.log_ratio)


def reference(signals: Signals, settings: CombineConfig, beta: float) -> Pair:
    """(A, l): maximises l (log T - log ref) - KL(pi, ref), which is l KL(pi, T) + (1 - l) KL(pi, ref) to minimise; the second
    term is `reference_coefficient`. G-OPD, arXiv 2602.12125. Per prefix its optimum is T^l ref^(1-l) / Z."""
    return signals.advantages, torch.full_like(signals.log_ratio, settings.extrapolation)


RULES: dict[str, Callable[[Signals, CombineConfig, float], Pair]] = {
    rule.__name__: rule for rule in (add, gate, sign, relu, modulate, ratio, reference)
}
"""The rules by the names of `objective.combine.kind`."""


def anchor(settings: CombineConfig, beta: float, old_T: Tensor, teacher_T: Tensor, distilled_T: Tensor) -> Tensor:
    """The log-probs [T] that the policy ratio compares log pi with: log pi_old, and with `ratio` (1 - beta) log pi_old + beta
    log T where the response is distilled. So the ratio is (pi / pi_old)^(1 - beta) (pi / T)^beta, whose pi keeps its gradient;
    it is not 1 on-policy."""
    if settings.kind != "ratio" or beta == 0:
        return old_T
    return torch.where(distilled_T, (1 - beta) * old_T + beta * teacher_T, old_T)


def reference_coefficient(settings: CombineConfig, coefficient: float, beta: float) -> float:
    """The coefficient of the KL to the initial student: `coefficient`, or with `reference` beta (1 - l), which is negative for
    l > 1."""
    return beta * (1 - settings.extrapolation) if settings.kind == "reference" else coefficient

"""What another sampler changes in the joint loss: GRPO's tokens are weighted by min(pi / mu, C) or dropped; the KD term has
w = 1 if the student's current weights sampled, and w = pi / mu if those of the step before did."""

from __future__ import annotations

import pytest
import torch

from kdrl_mcore.config import load_config
from kdrl_mcore.objective.joint import TokenBatch, joint_loss

BOUND = 1.25


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("kind", ["none", "truncate", "mask"])
def test_gradient_of_each_token(kind: str, on_policy: bool) -> None:
    """d loss_t / d log pi_t = -alpha A c - beta w d, for k2, by hand."""
    objective = load_config(
        [
            "objective=kdrl",
            "teacher.path=t",
            f"objective.sampler_correction.kind={kind}",
            *([f"objective.sampler_correction.bound={BOUND}"] if kind != "none" else []),
        ]
    ).objective
    alpha, beta = 0.7, 0.3
    log_pi = torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    log_ratio = torch.tensor([0.1, 0.4, -0.4, -0.02], dtype=torch.float64)
    teacher = torch.tensor([-0.8, -0.9, -1.0, -0.3], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    share = torch.full((4,), 0.25, dtype=torch.float64)
    batch = TokenBatch(
        advantages=advantages,
        policy_weights=share,
        distillation_weights=share,
        sampler_log_probs=(log_pi - log_ratio).detach(),
        on_policy=on_policy,
        teacher_log_probs=teacher,
    )
    loss, _, maxima = joint_loss(log_pi, batch, objective, alpha, beta)
    loss.sum().backward()

    ratio = log_ratio.exp()
    correction = {
        "none": torch.ones(4, dtype=torch.float64),
        "truncate": ratio.clamp(max=BOUND),
        "mask": torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),  # 1.49 and 0.67 are outside [0.8, 1.25]
    }[kind]
    w = torch.ones(4, dtype=torch.float64) if on_policy else ratio
    expected = -alpha * advantages * correction * share - beta * w * (teacher - log_pi.detach()) * share
    assert log_pi.grad is not None
    torch.testing.assert_close(log_pi.grad, expected)
    assert maxima["drift_max"] == pytest.approx(0.4)


def test_a_token_outside_the_students_support_has_no_weight_but_nan_stays_nan() -> None:
    now = torch.tensor([-1.0, -1e30, -2.0, torch.nan], requires_grad=True)
    old = torch.tensor([-1.5, -2.0, -1e30, -1.0])
    mu, share = torch.tensor([-1.2, -0.7, -0.4, -0.9]), torch.full((4,), 0.25)
    batch = TokenBatch(torch.ones(4), share, share, mu, old_log_probs=old)
    log_probs, inside = batch.within_support(now)
    torch.testing.assert_close(log_probs, torch.tensor([-1.0, -0.7, -0.4, torch.nan]), equal_nan=True)
    assert inside.policy_weights.tolist() == inside.distillation_weights.tolist() == [0.25, 0.0, 0.0, 0.25]
    assert inside.inside is not None and inside.inside.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert inside.old_log_probs is not None and inside.old_log_probs.tolist() == pytest.approx([-1.5, -0.7, -0.4, -1.0])
    log_probs.sum().backward()
    assert now.grad is not None and now.grad.tolist() == [1.0, 0.0, 0.0, 1.0]

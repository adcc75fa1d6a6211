"""The objective's pure functions agree with numbers that can be checked by hand. (tests/parallel compares the resulting
gradient with the dense reference.)"""

from __future__ import annotations

import json
import math

import pytest
import torch

from kdrl_mcore.config import ObjectiveConfig, OptimizerConfig, ScheduleConfig, load_config
from kdrl_mcore.errors import ConfigError, DataError
from kdrl_mcore.objective.advantages import group_advantages, shaped_rewards
from kdrl_mcore.objective.aggregation import distillation_weights, response_weights
from kdrl_mcore.objective.joint import TokenBatch, gradient_split, joint_loss
from kdrl_mcore.objective.masks import distillation_mask
from kdrl_mcore.objective.policy import clip
from kdrl_mcore.objective.schedules import Coefficient, learning_rate

GROUPS = torch.tensor([7, 7, 3, 3, 3])


def test_advantages_compare_the_responses_of_a_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0])
    std = math.sqrt(0.5)
    expected = [0.5 / (std + 1e-6), -0.5 / (std + 1e-6), -2 / (2 + 1e-6), 0, 2 / (2 + 1e-6)]
    assert group_advantages(rewards, GROUPS, normalize_by_std=True).tolist() == pytest.approx(expected)
    assert group_advantages(rewards, GROUPS, normalize_by_std=False).tolist() == pytest.approx([0.5, -0.5, -2, 0, 2])


def test_equal_rewards_give_exactly_zero_whatever_their_rounding() -> None:
    """The floating-point mean of 0.1, 0.1 and 0.1 is not 0.1."""
    assert group_advantages(torch.full((3,), 0.1), torch.zeros(3), normalize_by_std=True).tolist() == [0, 0, 0]


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(DataError, match="group 4 has a single response"):
        group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2, 2, 4]), normalize_by_std=True)


def test_reward_shaping_adds_the_log_ratio() -> None:
    assert shaped_rewards(torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 2.0]), 0.1).tolist() == pytest.approx([0.7, 0.2])


def test_masks_choose_responses_by_correctness() -> None:
    correct = torch.tensor([True, False, False, False, False])
    assert distillation_mask(correct, GROUPS, "none").tolist() == [True] * 5
    assert distillation_mask(correct, GROUPS, "response").tolist() == [False, True, True, True, True]
    assert distillation_mask(correct, GROUPS, "group").tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("denominator", ["all", "unmasked"])
def test_weights_of_what_is_counted_add_up_to_one(aggregation: str, denominator: str) -> None:
    lengths, distil = torch.tensor([3, 1, 8]), torch.tensor([True, False, True])
    assert float((response_weights(lengths, aggregation, 10) * lengths).sum()) == pytest.approx(1)
    weights = distillation_weights(lengths, distil, aggregation, 10, denominator)
    assert weights[1] == 0
    share = {"token_mean": 11 / 12, "sequence_mean": 2 / 3}[aggregation] if denominator == "all" else 1
    assert float((weights * lengths).sum()) == pytest.approx(share)
    nothing = distillation_weights(lengths, torch.zeros(3, dtype=torch.bool), aggregation, 10, denominator)
    assert nothing.tolist() == [0, 0, 0]


def test_the_sum_is_divided_by_a_constant_length() -> None:
    assert response_weights(torch.tensor([3, 1]), "sequence_sum_norm", 10).tolist() == pytest.approx([0.05, 0.05])


def test_the_surrogate_clips_only_where_that_makes_it_worse() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, clipped = clip(ratios.exp(), ratios, advantages, ObjectiveConfig(clip_low=0.2, clip_high=0.3))
    assert loss.tolist() == pytest.approx([-1.3, 1.5, -0.5, 0.8, -1.1])
    assert clipped.tolist() == [True, False, False, True, False]


def test_what_a_masked_token_was_given_by_the_teacher_touches_nothing() -> None:
    """Even for a NaN, the loss and its gradient are those without the token's distillation."""
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    batch = TokenBatch(
        advantages=torch.ones(2),
        policy_weights=torch.full((2,), 0.5),
        distillation_weights=torch.tensor([0.5, 0.0]),
        sampler_log_probs=torch.tensor([-1.0, -2.0]),
        teacher_log_probs=torch.tensor([-0.5, float("nan")]),
    )
    loss, sums, _ = joint_loss(log_probs, batch, ObjectiveConfig(), alpha=1.0, beta=2.0)
    loss.sum().backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([-0.5 - 2.0 * 0.5 * 0.5, -0.5])
    assert all(bool(torch.isfinite(value)) for value in sums.values())
    assert float(sums["distilled_tokens"]) == 1


def values(schedule: ScheduleConfig, kls: list[float | None]) -> list[float]:
    coefficient = Coefficient(schedule)
    result = [coefficient.value]
    for kl in kls:
        coefficient.advance(kl)
        result.append(coefficient.value)
    return result


def test_the_papers_annealing_reaches_its_floor_at_step_80() -> None:
    beta = values(load_config(["objective=kdrl_annealing", "teacher.path=x"]).objective.beta, [None] * 100)
    assert beta[0] == 5e-3 and beta[1] == pytest.approx(4.95e-3)
    assert beta[79] == pytest.approx(1.05e-3) and beta[80] == pytest.approx(1e-3) and beta[100] == 1e-3


def test_constant_cosine_and_switch() -> None:
    assert values(ScheduleConfig(init=0.3), [1.0, None]) == [0.3, 0.3, 0.3]
    cosine = values(ScheduleConfig(kind="cosine", init=1.0, min=0.2, steps=4), [None] * 6)
    assert cosine[0] == 1.0 and cosine[2] == pytest.approx(0.6) and cosine[4:] == pytest.approx([0.2] * 3)
    assert values(ScheduleConfig(kind="switch", init=1.0, after=0.0, steps=2), [None] * 3) == [1.0, 1.0, 0.0, 0.0]


def test_the_adaptive_coefficient_follows_the_measured_kl() -> None:
    schedule = ScheduleConfig(kind="adaptive", init=0.1, target=2.0, eta=0.5, min=0.05, max=0.2)
    measured = values(schedule, [2.0, 4.0, None, 0.0])
    up = 0.1 * math.exp(0.5)
    assert measured == pytest.approx([0.1, 0.1, up, up, up * math.exp(-0.5)])
    assert values(schedule, [1000.0] * 5)[-1] == 0.2 and values(schedule, [0.0] * 5)[-1] == 0.05


def test_a_coefficient_switches_once_where_the_kl_is_low() -> None:
    schedule = ScheduleConfig(kind="below", init=1.0, after=0.1, target=0.5)
    assert values(schedule, [0.9, None, 0.5, 0.9]) == [1.0, 1.0, 1.0, 0.1, 0.1]


def test_a_coefficient_switches_once_where_accuracy_rises_no_more() -> None:
    coefficient = Coefficient(ScheduleConfig(kind="plateau", init=1.0, after=0.0, patience=2))
    seen = []
    for accuracy in (0.2, 0.3, 0.3, 0.25, 0.9):
        coefficient.observe(accuracy)
        seen.append(coefficient.value)
    assert seen == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_coefficient_may_fall_once_it_has_switched() -> None:
    """SAF-OPD: the coefficient is constant until the KL is small and then linear, also after a resume."""
    schedule = ScheduleConfig(kind="below", init=0.1, after=0.1, target=0.5, delta=0.04, min=0.01)
    coefficient, values = Coefficient(schedule), []
    for kl in (0.9, 0.5, 0.9, 0.9, 0.9, 0.9):
        coefficient.advance(kl)
        state = coefficient.state_dict()
        coefficient = Coefficient(schedule)
        coefficient.load_state_dict(state)
        values.append(coefficient.value)
    assert values == pytest.approx([0.1, 0.1, 0.06, 0.02, 0.01, 0.01])
    switch = Coefficient(ScheduleConfig(kind="switch", init=0.0, after=1.0, steps=1, delta=0.25))
    values = []
    for _ in range(3):
        values.append(switch.value)
        switch.advance(None)
    assert values == [0.0, 1.0, 0.75]


def test_a_coefficient_rises_until_the_kl_has_fallen_by_a_share_and_then_falls() -> None:
    """SAF-OPD, resumed at every step."""
    schedule = ScheduleConfig(kind="below", init=0.1, after=0.1, ramp=4, drop=0.2, delta=0.02)

    def follow(kls: list[float | None]) -> list[float]:
        coefficient, values = Coefficient(schedule), []
        for kl in kls:
            values.append(coefficient.value)
            coefficient.advance(kl)
            state = json.loads(json.dumps(coefficient.state_dict()))
            coefficient = Coefficient(schedule)
            coefficient.load_state_dict(state)
        return values

    assert follow([1.0, 0.7, 0.9, 0.9]) == pytest.approx([0.025, 0.05, 0.1, 0.08])
    assert follow([1.0] * 7) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.08, 0.06])  # after the rise at the latest


def in_steps_of_three(step: int, schedule: ScheduleConfig) -> float:
    return schedule.init / (1 + step // 3)


def test_a_schedule_and_a_mask_may_be_ones_own() -> None:
    assert values(ScheduleConfig(kind=f"{__name__}:in_steps_of_three", init=1.0), [None] * 4) == [1.0, 1.0, 1.0, 0.5, 0.5]
    kept = distillation_mask(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]), f"{__name__}:correct_ones")
    assert kept.tolist() == [True, False, True]


def correct_ones(correct_N: torch.Tensor, group_ids_N: torch.Tensor) -> torch.Tensor:
    return correct_N


def test_a_plateau_is_remembered_in_a_checkpoint() -> None:
    schedule = ScheduleConfig(kind="plateau", init=1.0, after=0.0, patience=2)
    first, second = Coefficient(schedule), Coefficient(schedule)
    for accuracy in (0.5, 0.4):
        first.observe(accuracy)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.observe(0.4)
    assert second.value == 0.0
    second = Coefficient(schedule)
    second.load_state_dict({"step": 4, "adapted": 1.0})  # from an older version
    assert second.value == 1.0


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "switch", "below", "adaptive"])
def test_a_restored_schedule_goes_on_where_it_was(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, init=0.5, min=0.1, delta=0.03, steps=5, after=0.2, target=1.0)
    whole, first, second = Coefficient(schedule), Coefficient(schedule), Coefficient(schedule)
    for step in range(8):
        kl = 0.5 + 0.2 * step
        whole.advance(kl)
        (first if step < 4 else second).advance(kl)
        if step == 3:
            second.load_state_dict(first.state_dict())
    assert second.value == whole.value


@pytest.mark.parametrize(
    "keys", ["kind=cosine", "kind=switch", "kind=below", "kind=adaptive init=1.0", "kind=adaptive init=2 target=1 max=1"]
)
def test_schedules_that_cannot_be_are_refused(keys: str) -> None:
    with pytest.raises(ConfigError, match=r"objective\.beta\.\w+.*(needs|must lie between)"):
        load_config(["teacher.path=t", *(f"objective.beta.{key}" for key in keys.split())])


def test_the_learning_rate_warms_up_and_decays() -> None:
    settings = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule="linear")
    assert [learning_rate(step, 14, settings) for step in (0, 3, 4, 9, 14, 20)] == pytest.approx(
        [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
    )
    settings.schedule = "cosine"
    assert [learning_rate(step, 14, settings) for step in (4, 9, 14)] == pytest.approx([1.0, 0.55, 0.1])
    settings.schedule = "constant"
    assert learning_rate(13, 14, settings) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("updates", [2, 3, 16, 1000])
def test_the_learning_rate_arrives_when_the_last_update_is_made(schedule: str, updates: int) -> None:
    for warmup in {0, min(1, updates - 2), updates // 2 - 1, updates - 2}:
        settings = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup, schedule=schedule)
        rates = [learning_rate(step, updates, settings) for step in range(updates + 1)]
        assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.1) and min(rates[warmup:]) == rates[-1]
        assert rates[-2] > rates[-1]  # the last update still learns
    assert learning_rate(0, 1, OptimizerConfig(lr=1.0, schedule=schedule)) == 1.0  # a single update uses the peak


def test_two_gradients_have_a_cosine_unless_one_is_zero() -> None:
    """NaN would be reported as a fault, and a batch whose groups have equal rewards has no policy gradient."""
    assert gradient_split(3.0, 4.0, 5.0)["grad_cosine"] == 0.0
    assert gradient_split(0.0, 4.0, 4.0) == {"grad_norm_policy": 0.0, "grad_norm_kd": 4.0}

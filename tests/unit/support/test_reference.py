"""The dense reference agrees with what is known without it: identities, numbers computed by hand and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from tests.reference import dense
from tests.reference.dense import Row, Settings
from tests.reference.tiny_models import (
    make_qwen2,
    make_rollouts,
    make_tokenizer,
    read_hf_weights,
    read_jsonl,
    write_jsonl,
)

VOCABULARY = 23
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 48,
}
KD = Settings(alpha=0.0, beta=1.0)
ESTIMATORS = ("k1", "k2", "k3", "exact", "top_k", "top_k_unbiased")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("models") / "student", seed=1, **SMALL)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("models") / "teacher", seed=2, **{**SMALL, "vocab_size": VOCABULARY + 4})


@pytest.fixture(scope="module")
def rows(student: Path) -> list[Row]:
    return rollouts(student)


def rollouts(student: Path, **changes: Any) -> list[Row]:
    settings: dict[str, Any] = {
        "seed": 3,
        "num_groups": 2,
        "group_size": 3,
        "vocab_size": VOCABULARY,
        "max_prompt_tokens": 4,
        "max_response_tokens": 6,
    }
    return make_rollouts(student, **{**settings, **changes})


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The norm of the difference of two gradients, relative to the second."""
    return float(norm({name: left[name] - right[name] for name in right}) / norm(right))


def norm(gradient: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.norm() for value in gradient.values()]).norm()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
def test_a_teacher_that_is_the_student_teaches_nothing(student: Path, rows: list[Row], estimator: str) -> None:
    result = dense.kdrl(student, student, rows, replace(KD, estimator=estimator))
    assert result.loss == pytest.approx(0, abs=1e-9)
    assert result.grad_norm < 1e-7
    # With another teacher the same settings do distil (see the other tests), and this teacher leaves GRPO unchanged:
    joint = dense.kdrl(student, student, rows, Settings(beta=1.0, estimator=estimator))
    assert joint.grad_norm > 1e-3
    assert distance(joint.gradients, dense.kdrl(student, None, rows, Settings()).gradients) < 1e-6


def test_k2_on_policy_gradient_is_the_policy_gradient_of_the_log_ratio(student: Path, teacher: Path, rows: list[Row]) -> None:
    """On-policy, grad k2 = -d grad log pi, the policy gradient with advantage d, and so is grad k1."""
    k2 = dense.kdrl(student, teacher, rows, KD)
    model = dense.load_model(student)
    loss = torch.zeros((), dtype=torch.float64)
    for row, log_q in zip(rows, k2.teacher_log_probs, strict=True):
        logits = dense.response_logits(model, row, VOCABULARY, 1.0)
        log_pi = torch.log_softmax(logits, -1)[range(len(logits)), row["response_token_ids"]]
        loss = loss - ((log_q - log_pi).detach() * log_pi).sum()
    by_hand = dense.gradients_of(model, loss / sum(len(row["response_token_ids"]) for row in rows))
    assert distance(k2.gradients, by_hand) < 1e-6
    assert distance(dense.kdrl(student, teacher, rows, replace(KD, estimator="k1")).gradients, by_hand) < 1e-6
    assert distance(dense.kdrl(student, teacher, rows, replace(KD, placement="advantage")).gradients, by_hand) < 1e-6
    # k3 with w = 1 has another gradient, (1 - exp(d)) grad log pi; with a differentiable w (1 in value here) it has this one.
    k3 = replace(KD, estimator="k3")
    assert distance(dense.kdrl(student, teacher, rows, k3).gradients, by_hand) < 1e-6
    assert distance(dense.kdrl(student, teacher, rows, replace(k3, on_policy=True)).gradients, by_hand) > 0.1
    for estimator in ("k1", "k2"):
        on_policy = replace(KD, estimator=estimator, on_policy=True)
        assert distance(dense.kdrl(student, teacher, rows, on_policy).gradients, by_hand) < 1e-6


def every_first_token(student: Path, prompt: list[int]) -> list[Row]:
    """One response for each token of the vocabulary, only that token, so that a weighted mean over them is an expectation."""
    model = dense.load_model(student)
    row: Row = {"prompt_token_ids": prompt, "response_token_ids": [0], "reward": 0.0, "correct": False}
    with torch.no_grad():
        log_p = dense.response_logits(model, row, VOCABULARY, 1.0)[0].log_softmax(-1).tolist()
    return [
        {**row, "group_id": token, "response_token_ids": [token], "sampler_log_probs": [log_p[token]]}
        for token in range(VOCABULARY)
    ]


@pytest.mark.parametrize("estimator", ["k1", "k2", "top_k_unbiased"])
def test_the_expected_gradient_is_that_of_the_exact_reverse_kl(student: Path, teacher: Path, estimator: str) -> None:
    rows = every_first_token(student, [3, 1, 4])
    expected: dict[str, Tensor] = {}
    for row in rows:
        sampled = dense.kdrl(student, teacher, [row], replace(KD, estimator=estimator, top_k=5)).gradients
        weight = math.exp(row["sampler_log_probs"][0])
        expected = {name: expected.get(name, 0) + weight * value for name, value in sampled.items()}
    exact = dense.kdrl(student, teacher, rows[:1], replace(KD, estimator="exact"))
    assert exact.loss > 0.1
    assert distance(expected, exact.gradients) < 1e-6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_importance_weights_keep_the_expectation_under_another_sampler(student: Path, teacher: Path, estimator: str) -> None:
    """Tokens are drawn uniformly and w = pi / mu with uniform mu: the mean gradient is that of tokens drawn from pi."""
    settings = replace(KD, estimator=estimator)
    on_policy = every_first_token(student, [3, 1, 4])
    uniform = [{**row, "sampler_log_probs": [-math.log(VOCABULARY)]} for row in on_policy]
    by_uniform = dense.kdrl(student, teacher, uniform, settings)
    if estimator == "k3":  # with a differentiable w the value is the exact KL, and so is the gradient
        target = dense.kdrl(student, teacher, on_policy[:1], replace(KD, estimator="exact")).gradients
    else:
        target = {}
        for row in on_policy:
            weight = math.exp(row["sampler_log_probs"][0])
            one = dense.kdrl(student, teacher, [row], settings).gradients
            target = {name: target.get(name, 0) + weight * value for name, value in one.items()}
    assert distance(by_uniform.gradients, target) < 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        replace(KD, estimator="exact", temperature=0.7),
        replace(KD, estimator="k3", aggregation="sequence_mean"),
        replace(KD, estimator="top_k", top_k=5, top_k_tail="bucket"),
        replace(KD, estimator="top_k", top_k=5, top_k_tail="renormalize", top_k_support="teacher"),
        replace(KD, estimator="top_k", top_k=5, top_k_tail="truncate", mask="group", aggregation="sequence_sum_norm"),
    ],
    ids=lambda settings: f"{settings.estimator}-{settings.aggregation}-{settings.top_k_tail}",
)
def test_gradients_agree_with_finite_differences(student: Path, teacher: Path, rows: list[Row], settings: Settings) -> None:
    """For the losses without a stop-gradient, (L(w + e g) - L(w - e g)) / 2e = |g| along the unit gradient g, and likewise for
    one weight of each of two tensors.

    A top-k set of the student changes with its weights, and the loss then jumps: the step is too small for that, and large
    enough that float32 inside transformers' norms does not matter.
    """
    step, rel = (1e-4, 1e-2) if settings.estimator == "top_k" and settings.top_k_support == "student" else (1e-3, 1e-3)
    model, teacher_model = dense.load_model(student), dense.load_model(teacher)
    gradients = dense.kdrl_of_models(model, teacher_model, rows, settings).gradients
    weights = dict(model.named_parameters())

    def slope(direction: dict[str, Tensor], step: float) -> float:
        losses = []
        with torch.no_grad():
            for sign in (1, -1):
                for name, value in direction.items():
                    weights[name] += sign * step * value
                with torch.enable_grad():
                    losses.append(dense.kdrl_of_models(model, teacher_model, rows, settings).loss)
                for name, value in direction.items():
                    weights[name] -= sign * step * value
        return (losses[0] - losses[1]) / (2 * step)

    length = float(norm(gradients))
    unit = {name: value / length for name, value in gradients.items()}
    assert slope(unit, step) == pytest.approx(length, rel=rel)
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight"):
        index = int(gradients[name].abs().argmax())
        one = torch.zeros_like(gradients[name])
        one.view(-1)[index] = 1
        assert slope({name: one}, step) == pytest.approx(float(gradients[name].view(-1)[index]), rel=1e-2)


def test_grpo_by_hand(student: Path, rows: list[Row]) -> None:
    """Advantages from numbers that can be checked; the loss is -mean(A) and its gradient -A grad log pi over all tokens."""
    rewards = [1.0, 0.0, 0.0, 2.0, 4.0, 6.0]
    rows = [{**row, "reward": reward} for row, reward in zip(rows, rewards, strict=True)]
    result = dense.kdrl(student, None, rows, Settings())
    third = 1 / 3
    std = math.sqrt(((1 - third) ** 2 + 2 * third**2) / 2)
    expected = [(1 - third) / (std + 1e-6), -third / (std + 1e-6), -third / (std + 1e-6), -2 / (2 + 1e-6), 0, 2 / (2 + 1e-6)]
    assert result.advantages.tolist() == pytest.approx(expected)
    assert dense.kdrl(student, None, rows, Settings(normalize_by_std=False)).advantages.tolist() == pytest.approx(
        [1 - third, -third, -third, -2, 0, 2]
    )
    lengths = [len(row["response_token_ids"]) for row in rows]
    by_hand = {
        "token_mean": -sum(a * n for a, n in zip(expected, lengths, strict=True)) / sum(lengths),
        "sequence_mean": -sum(expected) / 6,
        "sequence_sum_norm": -sum(a * n for a, n in zip(expected, lengths, strict=True)) / (6 * 40),
    }
    for aggregation, loss in by_hand.items():
        settings = Settings(aggregation=aggregation, max_response_tokens=40)
        assert dense.kdrl(student, None, rows, settings).loss == pytest.approx(loss, rel=1e-6, abs=1e-9)


def test_equal_rewards_give_exactly_no_gradient(student: Path, rows: list[Row]) -> None:
    result = dense.kdrl(student, None, [{**row, "reward": 0.1} for row in rows], Settings())
    assert result.advantages.tolist() == [0.0] * len(rows)
    assert result.grad_norm == 0


def test_masks_and_their_denominator(student: Path, teacher: Path, rows: list[Row]) -> None:
    correct = [True, False, False, False, False, False]
    rows = [{**row, "correct": flag} for row, flag in zip(rows, correct, strict=True)]
    for mask, kept in {"none": [0, 1, 2, 3, 4, 5], "response": [1, 2, 3, 4, 5], "group": [3, 4, 5]}.items():
        everywhere = dense.kdrl(student, teacher, rows, replace(KD, mask=mask))
        assert everywhere.distilled.nonzero().flatten().tolist() == kept
        alone = dense.kdrl(student, teacher, [rows[i] for i in kept], KD)
        share = sum(len(rows[i]["response_token_ids"]) for i in kept) / sum(len(row["response_token_ids"]) for row in rows)
        assert everywhere.loss == pytest.approx(alone.loss * share)
        unmasked = dense.kdrl(student, teacher, rows, replace(KD, mask=mask, denominator="unmasked"))
        assert unmasked.loss == pytest.approx(alone.loss)
    all_correct = [{**row, "correct": True} for row in rows]
    for denominator in ("all", "unmasked"):
        nothing = dense.kdrl(student, teacher, all_correct, replace(KD, mask="response", denominator=denominator))
        assert (nothing.loss, nothing.grad_norm) == (0, 0)


def test_reward_placement_shapes_the_reward_before_group_normalisation(student: Path, teacher: Path, rows: list[Row]) -> None:
    plain = dense.kdrl(student, teacher, rows, KD)
    d_sum = [float((q - p).sum()) for q, p in zip(plain.teacher_log_probs, plain.log_probs, strict=True)]
    by_hand = [{**row, "reward": row["reward"] + 0.3 * d} for row, d in zip(rows, d_sum, strict=True)]
    shaped = dense.kdrl(student, teacher, rows, Settings(beta=0.3, placement="reward"))
    grpo = dense.kdrl(student, None, by_hand, Settings())
    assert shaped.loss == pytest.approx(grpo.loss)
    assert distance(shaped.gradients, grpo.gradients) < 1e-6


def test_sampler_correction_weighs_or_drops_tokens() -> None:
    log_pi = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    log_mu = log_pi - torch.tensor([3.0, 1.5, 0.25], dtype=torch.float64).log()  # pi / mu = 3, 1.5, 0.25
    for kind, expected in {"none": [1, 1, 1], "truncate": [2, 1.5, 0.25], "mask": [0, 1, 0]}.items():
        weights = dense.sampler_weight(log_pi, log_mu, Settings(correction=kind, correction_bound=2.0))
        assert weights.tolist() == pytest.approx(expected)


def test_columns_beyond_the_vocabulary_are_outside_both_softmaxes(student: Path, teacher: Path, rows: list[Row]) -> None:
    rows = [{**row, "response_token_ids": [token % 19 for token in row["response_token_ids"]]} for row in rows]
    result = dense.kdrl(student, teacher, rows, replace(KD, estimator="exact", vocab_size=19))
    assert (result.gradients["lm_head.weight"][19:] == 0).all()
    assert (result.gradients["lm_head.weight"][:19].norm(dim=1) > 0).all()
    wider = dense.kdrl(student, teacher, rows, replace(KD, estimator="exact"))
    assert (wider.gradients["lm_head.weight"][19:].norm(dim=1) > 0).all()
    assert all((a > b).all() for a, b in zip(result.log_probs, wider.log_probs, strict=True))
    assert all((h < math.log(19)).all() for h in result.entropies)


def test_sft_is_the_cross_entropy_that_transformers_computes(student: Path, rows: list[Row]) -> None:
    loss, gradients = dense.sft(student, rows)
    model = dense.load_model(student)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        ids = torch.tensor([row["prompt_token_ids"] + row["response_token_ids"]])
        labels = ids.clone()
        labels[:, : len(row["prompt_token_ids"])] = -100
        number = len(row["response_token_ids"])
        total, count = total + model(ids, labels=labels).loss * number, count + number
    assert loss == pytest.approx(float(total / count), rel=1e-5)
    assert distance(gradients, dense.gradients_of(model, total / count)) < 1e-5


def test_bad_input_is_refused(student: Path, rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="single response"):
        dense.kdrl(student, None, rows[:1], Settings())
    with pytest.raises(ValueError, match="needs a teacher"):
        dense.kdrl(student, None, rows, KD)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_learns_from_another_teacher(student: Path, teacher: Path, rows: list[Row], estimator: str) -> None:
    result = dense.kdrl(student, teacher, rows, replace(KD, estimator=estimator, top_k=5))
    assert all(float(value.norm()) > 0 for value in result.gradients.values())


def test_models_are_deterministic_and_complete(tmp_path: Path) -> None:
    whole = make_qwen2(tmp_path / "whole", seed=5, tied=True)
    sharded = make_qwen2(tmp_path / "sharded", seed=5, tied=True, max_shard_size="100KB")
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 2 and (sharded / "model.safetensors.index.json").is_file()
    first, second = read_hf_weights(whole), read_hf_weights(sharded)
    assert first.keys() == second.keys() and "lm_head.weight" not in first
    assert all(torch.equal(first[name], second[name]) and first[name].std() > 0.05 for name in first)
    other = read_hf_weights(make_qwen2(tmp_path / "other", seed=6, dtype=torch.bfloat16))
    assert "lm_head.weight" in other and {value.dtype for value in other.values()} == {torch.bfloat16}
    assert not torch.equal(other["model.norm.weight"].float(), first["model.norm.weight"])


def test_the_tokenizer_has_a_token_per_byte(tmp_path: Path) -> None:
    size = make_tokenizer(make_qwen2(tmp_path / "m", seed=5))
    text = "solve 3x + 4 = 10\n\\frac{1}{2}"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer(text)["input_ids"]
    assert size == 61 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0


def test_rollouts_are_deterministic_uneven_and_survive_the_file(student: Path, tmp_path: Path) -> None:
    rows = rollouts(student)
    assert rows == rollouts(student) == read_jsonl(write_jsonl(tmp_path / "r.jsonl", rows))
    assert rows != rollouts(student, seed=4)
    lengths = [len(row["response_token_ids"]) for row in rows]
    assert lengths[0] == 1 and len(set(lengths)) > 2
    assert {row["correct"] for row in rows[:3]} == {True, False} and not any(row["correct"] for row in rows[3:])
    exact = dense.kdrl(student, None, rows, Settings()).log_probs
    for row, noisy, log_pi in zip(rows, rollouts(student, noise=0.5), exact, strict=True):
        assert torch.tensor(row["sampler_log_probs"]).tolist() == pytest.approx(log_pi.tolist(), abs=1e-5)
        if len(log_pi) > 1:
            assert 0.01 < float((torch.tensor(noisy["sampler_log_probs"]) - log_pi).std()) < 2

"""KDRL computed in the plain way: one process, one unpadded sequence at a time, full logits, transformers and autograd.

It follows the method's definitions line by line and shares no code with kdrl_mcore. Axis letters: N responses,
T response tokens of one response, V vocabulary. Without log-probs of pi_old the update is the first on its rollouts: pi_old is
pi, so rho = pi / pi_old is 1 in value and only carries the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.reference import forms
from tests.reference.output_head import in_support

Row = dict[str, Any]
"""One line of a rollout file, with `teacher_prompts` if the teacher reads another prompt, and `given` if the response was not
sampled."""


@dataclass(frozen=True)
class Settings:
    """The settings of the objective, in the method's terms.

    Attributes:
        alpha, beta: coefficients of the GRPO and the distillation loss.
        estimator: k1, k2, k3, exact, top_k or top_k_unbiased.
        placement: where distillation enters: loss, advantage or reward.
        mask: which responses are distilled: none (all), response (incorrect), group (of groups without a correct one).
        denominator: what the distillation loss is averaged over: all responses or the unmasked ones.
        aggregation: token_mean, sequence_mean or sequence_sum_norm (divided by `max_response_tokens`, a constant).
        normalize_by_std: divide the group-centred reward by the group's standard deviation.
        clip_low, clip_high: the clip range of rho.
        correction: of the GRPO loss for the sampler: none, truncate or mask, with its `correction_bound`.
        on_policy: the student's current weights sampled the tokens, so w = pi / mu is 1: a constant for k2 and k3, but with the
            gradient of log pi for k1, which learns from nothing else. Otherwise w is pi / mu.
        reference, reference_estimator: coefficient and form (k2 or k3) of the KL to a frozen model, if one is given.
        temperature: the logits of all models are divided by it.
        vocab_size: number of tokens in both softmaxes; None means the smaller model's columns.
        top_k, top_k_support, top_k_tail: settings of the top-k estimators.
        combine, signal, agree, differ, modulate_clip, bounds, extrapolation: the rule that combines both signals (`forms.py`).
        token_weight, share, more, over, first_tokens, rate, low, middle, width, solved, unsolved, normalize: the weight of each
            distilled token.
        divergence, jsd_beta, entry_clip: reverse, forward (its entries bounded by entry_clip) or jsd. mix, mix_above: none,
            entropy, trust or drawn_trust, in addition to k2 of the sampled token. draw_seeds: response i draws from numpy's
            `default_rng([*draw_seeds, i])`.
        control_variate: k1 and k2 without the expectation of d at the prefix.
        stop_token: mask leaves the token that ends a response out of distillation.
        importance, importance_bound, importance_level: the bound of w = pi / mu: full, truncate or mask, for a token, a
            sequence or (mask) its geometric mean.
        correction_level: the level of `correction`: token, sequence or geometric.
        baseline: what a reward is compared with: group, leave_one_out or batch.
        policy_loss, ratio, dual_clip: clip or cispo, with the ratio of a token, or its mean or product over a sequence.
        clip_against: the denominator of that ratio: pi_old (old) or mu (sampler).
        entropy_bonus: coefficient of the entropy.
        support: top_p, top_k and min_p, which truncate the student's distribution: a token outside has no part in any loss.
        unshared: ids of tokens that mean something else to the teacher: a response is distilled up to the first one.
        truncated: drop leaves responses that reach the limit out of the policy loss.
    """

    alpha: float = 1.0
    beta: float = 0.0
    estimator: str = "k2"
    placement: str = "loss"
    mask: str = "none"
    denominator: str = "all"
    aggregation: str = "token_mean"
    max_response_tokens: int = 64
    normalize_by_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    correction: str = "none"
    correction_bound: float = 2.0
    on_policy: bool = False
    reference: float = 0.0
    reference_estimator: str = "k3"
    temperature: float = 1.0
    vocab_size: int | None = None
    top_k: int = 64
    top_k_support: str = "student"
    top_k_tail: str = "bucket"
    combine: str = "add"
    signal: str = "correct"
    agree: float = 1.8
    differ: float = 1.0
    modulate_clip: float = 0.2
    bounds: str = "both"
    extrapolation: float = 1.25
    token_weight: str = "constant"
    share: float = 0.5
    more: float = 0.1
    over: str = "response"
    first_tokens: int = 0
    rate: float = 1.0
    low: float = 0.25
    middle: float = 0.3
    width: float = 0.1
    solved: float = 1.0
    unsolved: float = 1.0
    normalize: bool = False
    divergence: str = "reverse"
    jsd_beta: float = 0.5
    entry_clip: float | None = None
    mix: str = "none"
    mix_above: float = 0.8
    draw_seeds: tuple[int, ...] = (1, 0)
    control_variate: bool = False
    stop_token: str = "keep"
    importance: str = "full"
    importance_bound: float = 2.0
    importance_level: str = "token"
    correction_level: str = "token"
    baseline: str = "group"
    policy_loss: str = "clip"
    ratio: str = "token"
    clip_against: str = "old"
    dual_clip: float | None = None
    entropy_bonus: float = 0.0
    truncated: str = "keep"
    support: tuple[float, int, float] = (1.0, 0, 0.0)
    unshared: tuple[int, ...] = ()


@dataclass(frozen=True)
class Taught:
    """What several teachers teach a response.

    Attributes:
        log_q: [T, V], the log-probs of their mixture.
        share: the sum of their shares, by which beta is multiplied; 0 where there is no teacher.
    """

    log_q: Tensor
    share: float


@dataclass(frozen=True)
class Result:
    """The quantities of one update.

    Attributes:
        loss, policy_loss, kd_loss, reference_loss: L, L_GRPO, L_KD (0 with placement advantage or reward, where there is
            none) and the KL to the reference.
        gradients: dL/dw by HF parameter name; a tied output head has no separate one.
        log_probs, entropies, teacher_log_probs: [T] per response, all at the temperature. teacher_log_probs is empty
            without a teacher. The log-prob of a token outside the student's support is about -1e30.
        inside: 1 for the tokens in the support of the student and of pi_old, else 0 [T] per response.
        advantages: A_i [N].
        distilled: whether response i is distilled [N]. scored: the smallest number of its tokens that the teacher must see.
    """

    loss: float
    policy_loss: float
    kd_loss: float
    reference_loss: float
    gradients: dict[str, Tensor]
    log_probs: list[Tensor]
    entropies: list[Tensor]
    teacher_log_probs: list[Tensor]
    advantages: Tensor
    distilled: Tensor
    scored: list[int]
    inside: list[Tensor]

    @property
    def grad_norm(self) -> float:
        """The global norm of the gradient."""
        return float(torch.stack([gradient.double().norm() for gradient in self.gradients.values()]).norm())


def load_model(path: str | Path, dtype: torch.dtype = torch.float64) -> Any:
    """The HF causal language model of a directory, with exact attention and experts."""
    exact = {"attn_implementation": "sdpa", "experts_implementation": "eager"}  # the grouped kernels do not support float64
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, **exact).eval()


def vocabulary_size(*models: Any) -> int:
    """The columns that all models have."""
    return min(model.config.vocab_size for model in models)


def response_logits(model: Any, row: Row, vocab_size: int, temperature: float) -> Tensor:
    """The logits [T, V] that predict each response token, at the temperature, without the columns beyond the vocabulary."""
    prompt, response = row["prompt_token_ids"], row["response_token_ids"]
    with chosen_experts(model, row):
        logits = model(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1, :vocab_size] / temperature


@contextmanager
def chosen_experts(model: Any, row: Row) -> Iterator[None]:
    """With `chosen` in the row, [tokens - 1][layers][experts of a token], the routers of a Qwen3 mixture choose these, except
    for the last token; their weights are the model's."""
    replays = "chosen" in row and model.config.model_type == "qwen3_moe"
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")] if replays else []
    handles = []
    for number, gate in enumerate(gates):
        chosen = torch.tensor(row["chosen"])[:, number]

        def choose(gate: Any, _: Any, outputs: Any, chosen: Tensor = chosen) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, own = outputs
            indices = torch.cat((chosen, own[len(chosen) :]))
            weights = logits.softmax(-1).gather(1, indices)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(1, keepdim=True)
            return logits, weights, indices

        handles.append(gate.register_forward_hook(choose))
    yield
    for handle in handles:
        handle.remove()


def as_teacher_reads(row: Row) -> Row:
    """The row with the teacher's prompt, if that is another one, and without the student's experts."""
    row = {key: value for key, value in row.items() if key != "chosen"}
    return {**row, "prompt_token_ids": row.get("teacher_prompts", {}).get("teacher", row["prompt_token_ids"])}


def readable(row: Row, settings: Settings) -> Tensor:
    """1 for the tokens before the first that means something else to the teacher, then 0 [T]."""
    other = torch.isin(torch.tensor(row["response_token_ids"]), torch.tensor(settings.unshared, dtype=torch.long))
    return (other.cumsum(0) == 0).double()


def log_prob_of(log_p_T_V: Tensor, row: Row) -> Tensor:
    """The log-prob of each response token [T]."""
    return log_p_T_V.gather(1, torch.tensor(row["response_token_ids"])[:, None]).squeeze(1)


def entropy_of(log_p_T_V: Tensor) -> Tensor:
    """-sum_v p_v log p_v [T]."""
    return -(log_p_T_V.exp() * log_p_T_V).sum(1)


def kdrl(
    student_path: str | Path,
    teacher_path: str | Path | None,
    rows: Sequence[Row],
    settings: Settings,
    dtype: torch.dtype = torch.float64,
    reference_path: str | Path | None = None,
) -> Result:
    """The loss and the gradient of one KDRL update on a rollout batch.

    Raises:
        ValueError: a group of one response while alpha > 0; beta > 0 without a teacher; an unknown setting.
    """
    student = load_model(student_path, dtype)
    teacher = None if teacher_path is None else load_model(teacher_path, dtype)
    reference = None if reference_path is None else load_model(reference_path, dtype)
    return kdrl_of_models(student, teacher, rows, settings, reference=reference)


def kdrl_of_models(
    student: Any,
    teacher: Any | None,
    rows: Sequence[Row],
    settings: Settings,
    *,
    log_old: Sequence[Tensor] | None = None,
    reference: Any | None = None,
    taught: Sequence[Taught] | None = None,
) -> Result:
    """`kdrl` for loaded models; the student's gradients also stay in its parameters.

    Args:
        taught: instead of a teacher, what each response is taught.
        log_old: log pi_old [T] per response, from the weights at the start of this rollout batch.
    """
    if settings.beta > 0 and teacher is None and taught is None:
        raise ValueError("beta > 0 needs a teacher")
    models = [student] if teacher is None else [student, teacher]
    vocab_size = settings.vocab_size or vocabulary_size(*models)

    # log p and log q over the vocabulary [T, V], and of the tokens o_t [T], per response
    logits = [response_logits(student, row, vocab_size, settings.temperature) for row in rows]
    log_p = [each.masked_fill(~in_support(each.detach(), *settings.support), -1e30).log_softmax(-1) for each in logits]
    raw_log_pi = [log_prob_of(each, row) for each, row in zip(log_p, rows, strict=True)]
    log_q: list[Tensor] = []
    if teacher is not None:
        with torch.no_grad():
            read = [as_teacher_reads(row) for row in rows]
            log_q = [torch.log_softmax(response_logits(teacher, row, vocab_size, settings.temperature), -1) for row in read]
    if taught is not None:
        log_q = [each.log_q for each in taught]
    log_teacher = [log_prob_of(each, row) for each, row in zip(log_q, rows, strict=False)]
    log_mu = [torch.tensor(row["sampler_log_probs"], dtype=student.dtype) for row in rows]
    known = [raw_log_pi, raw_log_pi if log_old is None else log_old]
    inside = [((now > -1e29) & (old > -1e29)).to(now.dtype) for now, old in zip(*known, strict=True)]
    log_pi, log_old = (
        [torch.where(each != 0, value, mu) for each, value, mu in zip(inside, values, log_mu, strict=True)] for values in known
    )

    given = torch.tensor([bool(row.get("given")) for row in rows])  # not sampled: always distilled, and nothing else
    distilled = (distillation_mask(rows, settings.mask) | given) & (settings.beta > 0)
    shares = [1.0] * len(rows) if taught is None else [each.share for each in taught]
    distilled = distilled & (torch.tensor(shares) > 0)
    rewards = torch.tensor([row["reward"] for row in rows], dtype=student.dtype)
    if settings.placement == "reward" and settings.beta > 0:  # r_i + beta sum_t d, before group normalisation
        d_sum = torch.stack(  # as they were sampled
            [(log_teacher[i] - log_mu[i])[: forms.before_end(rows[i], settings)].sum() for i in range(len(rows))]
        )
        rewards = rewards + settings.beta * torch.where(distilled, d_sum, 0.0)
    advantages = torch.zeros_like(rewards)
    if settings.alpha > 0:
        groups = [row["group_id"] for row in rows if not row.get("given")]
        advantages[~given] = group_advantages(rewards[~given], groups, settings.normalize_by_std)
        if settings.baseline != "group":
            advantages[~given] = forms.other_advantages(rewards[~given], groups, settings)

    everything = torch.ones(len(rows), dtype=torch.bool)
    if settings.combine == "gate":
        distilled = distilled & torch.tensor([not row["correct"] for row in rows]) | distilled & given
    if settings.combine in ("modulate", "ratio") or (settings.combine == "relu" and settings.signal == "advantage"):
        distilled = distilled & ((advantages != 0) | given)  # the teacher multiplies the advantage
    counted = everything if settings.denominator == "all" else distilled
    rewarded = ~given
    if settings.truncated == "drop":
        rewarded = rewarded & torch.tensor([row.get("finish_reason") != "length" for row in rows])
    before = [each.detach() for each in log_old]
    before = log_mu if settings.clip_against == "sampler" else before
    correction = [sampler_weight(before[i], log_mu[i], settings, inside[i]) * inside[i] for i in range(len(rows))]
    d_now = [
        (log_teacher[i] - log_pi[i]).detach() if distilled[i] else torch.zeros_like(log_pi[i]).detach()
        for i in range(len(rows))
    ]
    for i, row in enumerate(rows):
        d_now[i][forms.before_end(row, settings) :] = 0.0
        d_now[i] = d_now[i] * readable(row, settings) * inside[i]
    pairs = [forms.combine(advantages[i], d_now[i], bool(distilled[i]), rows[i], settings) for i in range(len(rows))]
    compared = [
        forms.compared_with(before[i], log_teacher[i] if log_teacher else None, bool(distilled[i]), rows[i], settings)
        for i in range(len(rows))
    ]
    policy_terms = [
        forms.policy_term(log_pi[i], compared[i], pairs[i][0], settings, inside[i]) * correction[i] for i in range(len(rows))
    ]
    policy_loss = aggregate(policy_terms, rewarded, rewarded, settings)
    loss = settings.alpha * policy_loss if settings.placement != "advantage" else torch.zeros_like(policy_loss)
    if settings.entropy_bonus:
        bonus = [entropy_of(log_p[i]) * inside[i] for i in range(len(rows))]
        loss = loss - settings.entropy_bonus * aggregate(bonus, rewarded, rewarded, settings)
    kd_loss = torch.zeros_like(loss)
    entropies = [entropy_of(each.detach()) for each in (log_q if settings.token_weight == "teacher_entropy" else log_p)]
    token_weights = forms.token_weights(d_now, entropies, distilled, rows, settings)
    token_weights = [weights * readable(rows[i], settings) * inside[i] for i, weights in enumerate(token_weights)]
    if settings.beta > 0 and settings.placement == "loss":
        kd_terms = [
            kd_term(i, log_p[i], log_q[i], log_pi[i], log_teacher[i], log_mu[i], rows[i], settings)
            * pairs[i][1]
            * token_weights[i]
            * shares[i]
            for i in range(len(rows))
        ]
        kd_loss = aggregate(kd_terms, distilled, counted, settings)
        loss = loss + settings.beta * kd_loss
    if settings.placement == "advantage":  # the advantage is alpha A + beta sg(d), each with its own share of the batch's loss
        lengths = [len(each) for each in log_pi]
        of_reward, of_teacher = (shares_of(lengths, *which, settings) for which in ((rewarded, rewarded), (distilled, counted)))
        for i in range(len(rows)):
            advantage = settings.alpha * pairs[i][0] * of_reward[i]
            if distilled[i]:
                d = (log_teacher[i] - log_pi[i]).detach()
                sampled, shared = forms.shares(i, d, entropy_of(log_q[i]), settings)
                if settings.control_variate:
                    d = d - expected_log_ratio(log_p[i], log_q[i])
                advantage = advantage + settings.beta * sampled * d * token_weights[i] * of_teacher[i]
                if settings.mix != "none":
                    other = shared * forms.other_divergence(log_p[i], log_q[i], settings) * token_weights[i]
                    loss = loss + settings.beta * other.sum() * of_teacher[i]
            loss = loss + (forms.policy_term(log_pi[i], before[i], advantage, settings, inside[i]) * correction[i]).sum()
    reference_loss = torch.zeros_like(loss)
    if reference is not None:
        reference_terms = []
        for i, row in enumerate(rows):
            with torch.no_grad():
                log_ref = log_prob_of(response_logits(reference, row, vocab_size, settings.temperature).log_softmax(-1), row)
            joined = settings.combine == "reference"
            w = importance_weight(
                log_pi[i], log_mu[i], settings.reference_estimator, settings if joined else replace(settings, importance="full")
            )
            term = sampled_kl(log_ref - log_pi[i], w, settings.reference_estimator) * inside[i]
            reference_terms.append(term * token_weights[i] if joined else term)
        reference_loss = aggregate(reference_terms, ~given, ~given, settings)
        of_reference = settings.reference
        if settings.combine == "reference":  # beta (l KL(pi, T) + (1 - l) KL(pi, ref)), both on the distilled tokens
            reference_loss = aggregate(reference_terms, distilled, counted, settings)
            of_reference = settings.beta * (1 - settings.extrapolation)
        loss = loss + of_reference * reference_loss

    return Result(
        loss=float(loss.detach()),
        policy_loss=float(policy_loss.detach()),
        kd_loss=float(kd_loss.detach()),
        reference_loss=float(reference_loss.detach()),
        gradients=gradients_of(student, loss),
        log_probs=[each.detach() for each in raw_log_pi],
        entropies=[entropy_of(each.detach()) for each in log_p],
        teacher_log_probs=log_teacher,
        advantages=advantages,
        distilled=distilled,
        scored=[
            min(forms.taught_at_most(len(log_pi[i]), settings), int(readable(row, settings).sum())) if distilled[i] else 0
            for i, row in enumerate(rows)
        ],
        inside=inside,
    )


def sft(
    student_path: str | Path,
    rows: Sequence[Row],
    *,
    aggregation: str = "token_mean",
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[float, dict[str, Tensor]]:
    """-log pi(target) on given responses at temperature 1, and its gradient by HF parameter name."""
    student = load_model(student_path, dtype)
    columns = vocab_size or vocabulary_size(student)
    terms = [-log_prob_of(torch.log_softmax(response_logits(student, row, columns, 1.0), -1), row) for row in rows]
    everything = torch.ones(len(rows), dtype=torch.bool)
    loss = aggregate(terms, everything, everything, Settings(aggregation=aggregation))
    return float(loss), gradients_of(student, loss)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """dL/dw by parameter name; zero where the loss does not depend on the parameter."""
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def distillation_mask(rows: Sequence[Row], mask: str) -> Tensor:
    """Which responses are distilled [N]: `response` keeps the incorrect ones, `group` those of all-incorrect groups."""
    if mask == "none":
        keep = [True for _ in rows]
    elif mask == "response":
        keep = [not row["correct"] for row in rows]
    elif mask == "group":
        solved = {row["group_id"] for row in rows if row["correct"]}
        keep = [row["group_id"] not in solved for row in rows]
    else:
        raise ValueError(f"mask {mask}")
    return torch.tensor(keep)


def group_advantages(rewards: Tensor, groups: Sequence[int], normalize_by_std: bool) -> Tensor:
    """A_i = (r_i - mean_group r) / (std_group r + 1e-6), std with n - 1; exactly zero if all rewards of the group are equal."""
    advantages = torch.zeros_like(rewards)
    for group in set(groups):
        members = torch.tensor([i for i, other in enumerate(groups) if other == group])
        r = rewards[members]
        if len(members) == 1:
            raise ValueError(f"group {group} has a single response")
        if r.min() == r.max():
            continue
        centred = r - r.mean()
        advantages[members] = centred / (r.std(unbiased=True) + 1e-6) if normalize_by_std else centred
    return advantages


def sampler_weight(log_old_T: Tensor, log_mu_T: Tensor, settings: Settings, inside_T: Tensor | None = None) -> Tensor:
    """sg(min(pi_old / mu, C)); or 0 for tokens outside [1/C, C] and 1 inside; or 1 [T]."""
    log_ratio_T, bound = (log_old_T - log_mu_T).detach(), settings.correction_bound
    if settings.correction_level != "token":  # one number for the response
        count = len(log_ratio_T) if inside_T is None else int(inside_T.sum().clamp_min(1))
        whole = log_ratio_T.sum() / (1 if settings.correction_level == "sequence" else count)
        log_ratio_T = whole.expand(len(log_ratio_T))
    ratio_T = log_ratio_T.exp()
    if settings.correction == "truncate":
        return torch.minimum(ratio_T, torch.full_like(ratio_T, bound))
    if settings.correction == "mask":
        return ((1 / bound <= ratio_T) & (ratio_T <= bound)).to(ratio_T)
    if settings.correction == "none":
        return torch.ones_like(ratio_T)
    raise ValueError(f"correction {settings.correction}")


def expected_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """E_pi[log q - log pi] at each prefix [T], a constant."""
    return (log_p.exp() * (log_q - log_p)).sum(1).detach()


def kd_term(
    i: int,
    log_p: Tensor,
    log_q: Tensor,
    log_pi_T: Tensor,
    log_teacher_T: Tensor,
    log_mu_T: Tensor,
    row: Row,
    settings: Settings,
) -> Tensor:
    """The per-token term of the distillation loss [T]; log_p and log_q are the student's and the teacher's [T, V]; `i` is the
    response's index in the batch."""
    d = log_teacher_T - log_pi_T
    w = importance_weight(log_pi_T, log_mu_T, settings.estimator, settings)
    p = log_p.exp()
    if settings.estimator in ("k1", "k2", "k3"):
        return sampled_kl(d - expected_log_ratio(log_p, log_q) if settings.control_variate else d, w, settings.estimator)
    if settings.divergence != "reverse":
        sampled, shared = forms.shares(i, d.detach(), entropy_of(log_q), settings)
        return sampled * sampled_kl(d, w, "k2") + shared * forms.other_divergence(log_p, log_q, settings)
    if settings.estimator == "exact":
        return (p * (log_p - log_q)).sum(1)
    ranking = log_q if settings.estimator == "top_k" and settings.top_k_support == "teacher" else log_p.detach()
    support = ranking.topk(min(settings.top_k, log_p.shape[1]), dim=1).indices
    if settings.estimator == "top_k":
        return top_k_kl(log_p, log_q, support, settings.top_k_tail)
    if settings.estimator == "top_k_unbiased":
        inside = ((p * (log_p - log_q)).detach() * log_p).gather(1, support).sum(1)
        outside = (support != torch.tensor(row["response_token_ids"])[:, None]).all(1)
        return inside + outside * w.detach() * 0.5 * d**2
    raise ValueError(f"estimator {settings.estimator}")


def importance_weight(log_pi_T: Tensor, log_mu_T: Tensor, estimator: str, settings: Settings) -> Tensor:
    """w = pi / mu [T], differentiable; on-policy it is 1, with the gradient of log pi only for k1."""
    if not settings.on_policy:
        w_T = (log_pi_T - log_mu_T).exp()
        number_T = judged_T = w_T.detach()
        if settings.importance_level == "sequence":
            number_T = judged_T = w_T.detach().prod().expand(len(w_T))
        elif settings.importance_level == "geometric":
            judged_T = (w_T.detach().log().sum() / len(w_T)).exp().expand(len(w_T))
        elif settings.importance == "full":
            return w_T
        if settings.importance == "truncate":
            number_T = torch.minimum(number_T, torch.full_like(number_T, settings.importance_bound))
        elif settings.importance == "mask":
            outside_T = (judged_T < 1 / settings.importance_bound) | (judged_T > settings.importance_bound)
            number_T = number_T.masked_fill(outside_T, 0.0)
        return number_T * (log_pi_T - log_pi_T.detach()).exp()
    return (log_pi_T - log_pi_T.detach()).exp() if estimator == "k1" else torch.ones_like(log_pi_T)


def sampled_kl(d_T: Tensor, w_T: Tensor, estimator: str) -> Tensor:
    """The estimators of KL(pi || q) from d = log q - log pi of the sampled tokens and their weight w [T]."""
    if estimator == "k1":
        return -w_T * d_T.detach()
    if estimator == "k2":
        return w_T.detach() * 0.5 * d_T**2
    if estimator == "k3":
        return w_T * (d_T.exp() - 1 - d_T)
    raise ValueError(f"estimator {estimator}")


def top_k_kl(log_p: Tensor, log_q: Tensor, support: Tensor, tail: str) -> Tensor:
    """sum over the support of p (log p - log q) [T].

    The tail: `truncate` leaves out the rest, `renormalize` makes p and q distributions on the support, `bucket` adds the
    rest of both as one more token.
    """
    log_p_S, log_q_S = log_p.gather(1, support), log_q.gather(1, support)
    if tail == "renormalize":
        log_p_S, log_q_S = log_p_S.log_softmax(1), log_q_S.log_softmax(1)
    inside = (log_p_S.exp() * (log_p_S - log_q_S)).sum(1)
    if tail == "corrected":
        return inside - log_p_S.exp().sum(1) + log_q_S.exp().sum(1)
    if tail in ("truncate", "renormalize") or support.shape[1] == log_p.shape[1]:
        return inside
    if tail == "bucket":
        in_support = torch.zeros_like(log_p, dtype=torch.bool).scatter(1, support, True)
        log_p_rest = log_p.masked_fill(in_support, -torch.inf).logsumexp(1)
        log_q_rest = log_q.masked_fill(in_support, -torch.inf).logsumexp(1)
        return inside + log_p_rest.exp() * (log_p_rest - log_q_rest)
    raise ValueError(f"tail {tail}")


def shares_of(lengths: Sequence[int], kept: Tensor, counted: Tensor, settings: Settings) -> list[float]:
    """The factor by which `aggregate` multiplies each token of each response."""
    ones = [torch.ones(1, dtype=torch.float64) for _ in lengths]
    shares = []
    for i in range(len(lengths)):
        alone = torch.zeros_like(kept)
        alone[i] = kept[i]
        whole = [one.expand(length) / length for one, length in zip(ones, lengths, strict=True)]
        shares.append(float(aggregate(whole, alone, counted, settings)))
    return shares


def aggregate(terms: Sequence[Tensor], kept: Tensor, counted: Tensor, settings: Settings) -> Tensor:
    """The batch's loss from per-token terms: the kept responses are summed, and the counted ones give the denominator."""
    zero = terms[0].sum() * 0.0
    sums = [term.sum() if kept[i] else zero for i, term in enumerate(terms)]
    lengths = [len(term) for term in terms]
    num_counted = int(counted.sum())
    if num_counted == 0:
        return zero
    if settings.aggregation == "token_mean":
        return torch.stack(sums).sum() / sum(length for i, length in enumerate(lengths) if counted[i])
    if settings.aggregation == "sequence_mean":
        return torch.stack([total / length for total, length in zip(sums, lengths, strict=True)]).sum() / num_counted
    if settings.aggregation == "sequence_sum_norm":
        return torch.stack(sums).sum() / (num_counted * settings.max_response_tokens)
    raise ValueError(f"aggregation {settings.aggregation}")

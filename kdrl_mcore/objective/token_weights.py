"""Which tokens of a response are taught, and how much: a weight of each token's distillation.

A share is a share of the tokens of one response, or of the whole update over all ranks and micro-batches, so weights are the
same in every layout. T tokens of a response, N responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdrl_mcore.config import TokenWeightConfig
from kdrl_mcore.objective.functions import find_function
from kdrl_mcore.types import TokenFloats


@dataclass(frozen=True)
class ResponseScores:
    """The inputs of a rule for one response.

    Attributes:
        tokens: T.
        pass_rate: the share of correct responses in its group.
        log_ratio, entropy: d = log T - log pi and the student's entropy [T]; None unless the rule is one of
            `config.derived.WEIGHTS_OF_SCORES`.
        teacher_entropy: the teacher's entropy [T]; None unless the rule needs it.
    """

    tokens: int
    pass_rate: float
    log_ratio: TokenFloats | None = None
    entropy: TokenFloats | None = None
    teacher_entropy: TokenFloats | None = None


def constant(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """1."""
    return np.ones(response.tokens, np.float32)


def entropy(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """1 for the `share` of tokens with the highest entropies of the student and, of the others, the share `more` with the
    largest |d|: where it is unsure, and where it is surely wrong. TIP, arXiv 2604.14084."""
    assert response.entropy is not None and response.log_ratio is not None
    chosen = _largest(response.entropy, settings.share)
    left = np.flatnonzero(~chosen)
    chosen[left[_largest(np.abs(response.log_ratio)[left], settings.more)]] = True
    return chosen.astype(np.float32)


def magnitude(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """tanh(d) / d for the `share` of tokens with the largest |d|, else 0: with k1 or k2 log pi has the coefficient tanh(d).
    SAF-OPD, arXiv 2607.29209, whose c is the coefficient beta."""
    assert response.log_ratio is not None
    d = response.log_ratio.astype(np.float64)
    flat = np.divide(np.tanh(d), d, out=np.ones_like(d), where=d != 0)
    return np.where(_largest(np.abs(d), settings.share), flat, 0.0).astype(np.float32)


def prefix(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """1 for the first `tokens` or, if that is 0, the first `share` of the response, else 0. Prefix OPD, arXiv 2602.15260."""
    return (np.arange(response.tokens) < _taught_prefix(settings, response.tokens)).astype(np.float32)


def rising(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """low + (1 - low) sigmoid((x - middle) / width), x = (t + 1/2) / T the position: early tokens decide between ways that may
    all be right, later ones carry one out. PW-OPSD, arXiv 2605.21606."""
    position = (np.arange(response.tokens) + 0.5) / max(response.tokens, 1)
    risen = 0.5 * (1 + np.tanh((position - settings.middle) / (2 * settings.width)))  # the sigmoid, without overflow
    return (settings.low + (1 - settings.low) * risen).astype(np.float32)


def pass_rate(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """p^solved (1 - p)^unsolved, p the group's share of correct responses: largest if it is sometimes solved. PACED,
    arXiv 2603.11178."""
    p = response.pass_rate
    return np.full(response.tokens, p**settings.solved * (1 - p) ** settings.unsolved, np.float32)


def trusted_prefix(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """1 + rate (1 - s), s the share of the response's sum of |d| that lies in the tokens before: the teacher is trusted while
    it might have written the prefix itself. IW-OPD, arXiv 2606.22600."""
    assert response.log_ratio is not None
    size = np.abs(response.log_ratio.astype(np.float64))
    before = np.cumsum(size) - size
    return (1 + settings.rate * (1 - before / max(size.sum(), 1e-8))).astype(np.float32)


def teacher_entropy(response: ResponseScores, settings: TokenWeightConfig) -> TokenFloats:
    """exp(-rate H_T): the teacher counts less where it is unsure. SRPO, arXiv 2604.02288, which normalises to mean 1
    (`normalize`)."""
    assert response.teacher_entropy is not None
    return np.exp(-settings.rate * response.teacher_entropy.astype(np.float64)).astype(np.float32)


Rule = Callable[[ResponseScores, TokenWeightConfig], TokenFloats]
Weights = list[TokenFloats | None]
RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (constant, entropy, magnitude, prefix, rising, pass_rate, trusted_prefix, teacher_entropy)
}
"""The rules by the names of `objective.kd.token_weight.kind`."""


def token_weights(
    responses: Sequence[ResponseScores | None], settings: TokenWeightConfig, ends_masked: Sequence[bool]
) -> Weights:
    """The weight of each token of each response [T]; None for responses that are not distilled.

    Args:
        responses: None where the response is not distilled.
        ends_masked: whether the weight of a response's last token, its stop token, is 0.
    """
    rule = find_function("objective.kd.token_weight.kind", settings.kind, RULES)
    if settings.over == "batch":
        weights = _weights_of_batch(rule, responses, settings)
    else:
        weights = [None if response is None else rule(response, settings) for response in responses]
    for weight, masked in zip(weights, ends_masked, strict=True):
        if weight is not None and masked and len(weight):
            weight[-1] = 0.0
    if settings.normalize:
        given = [weight for weight in weights if weight is not None]
        total, tokens = sum(float(weight.sum(dtype=np.float64)) for weight in given), sum(map(len, given))
        scale = np.float32(tokens / total if total else 0.0)
        weights = [None if weight is None else weight * scale for weight in weights]
    return weights


def _weights_of_batch(rule: Rule, responses: Sequence[ResponseScores | None], settings: TokenWeightConfig) -> Weights:
    """The rule's weights for the tokens of all responses, treated as one response."""
    taught = [response for response in responses if response is not None]
    if not taught:
        return [None for _ in responses]
    log_ratios, entropies = ([getattr(each, name) for each in taught] for name in ("log_ratio", "entropy"))
    lengths = [response.tokens for response in taught]
    joined = rule(ResponseScores(sum(lengths), 0.0, np.concatenate(log_ratios), np.concatenate(entropies)), settings)
    parts = iter(np.split(joined, np.cumsum(lengths)[:-1]))
    return [None if response is None else next(parts) for response in responses]


def scored_tokens(settings: TokenWeightConfig, lengths_N: Tensor, distil_N: Tensor) -> Tensor:
    """How many tokens of each response, from its start, the teacher must score [N]: tokens that the rule leaves out at the end
    of a response cost the teacher nothing. 0 for responses that are not distilled.

    Args:
        lengths_N: response tokens.
        distil_N: which responses are distilled (bool).
    """
    scored_N = torch.where(distil_N, lengths_N, 0)
    if settings.kind != "prefix":
        return scored_N
    return torch.tensor([min(_taught_prefix(settings, tokens), tokens) for tokens in scored_N.tolist()], dtype=torch.long)


def _taught_prefix(settings: TokenWeightConfig, tokens: int) -> int:
    """The number of tokens that `prefix` teaches in a response of `tokens` tokens."""
    return settings.tokens or _count(settings.share, tokens)


def _count(share: float, tokens: int) -> int:
    """`share` of the tokens, rounded up."""
    return int(np.ceil(share * tokens - 1e-9))


def _largest(values: TokenFloats, share: float) -> np.ndarray:
    """True for the `share` of the values that are largest, rounded up; among equal ones the earlier."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values.astype(np.float64), kind="stable")[: _count(share, len(values))]] = True
    return chosen

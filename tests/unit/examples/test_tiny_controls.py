from __future__ import annotations

import numpy as np
import torch

from examples.tiny.controls import random_groups, random_responses, random_tokens
from kdrl_mcore.config import TokenWeightConfig
from kdrl_mcore.objective.masks import group, response
from kdrl_mcore.objective.token_weights import ResponseScores, entropy


def test_as_many_responses_and_groups_as_the_masks_have_but_others() -> None:
    generator = torch.Generator().manual_seed(1)
    groups_N = torch.arange(64).repeat_interleave(8) + 5
    correct_N = torch.rand(512, generator=generator) < 0.15
    responses, whole = random_responses(correct_N, groups_N), random_groups(correct_N, groups_N)
    assert responses.sum() == response(correct_N, groups_N).sum() and not responses.equal(response(correct_N, groups_N))
    assert whole.sum() == group(correct_N, groups_N).sum() > 0 and not whole.equal(group(correct_N, groups_N))
    assert all(len(set(each.tolist())) == 1 for each in whole.view(64, 8))
    assert random_responses(correct_N, groups_N).equal(responses)  # the same in every layout
    correct_N[0] = ~correct_N[0]
    assert (random_responses(correct_N, groups_N) ^ responses).sum() > 10  # drawn anew in the next step


def test_as_many_tokens_as_the_rule_chooses() -> None:
    rng = np.random.default_rng(1)
    for tokens in (0, 1, 7, 40):
        scores = ResponseScores(tokens, 0.5, *(rng.standard_normal(tokens).astype(np.float32) for _ in range(2)))
        settings = TokenWeightConfig(kind="entropy", share=0.4, more=0.3)
        drawn = random_tokens(scores, settings)
        assert drawn.sum() == entropy(scores, settings).sum() and drawn.shape == (tokens,)
    assert (drawn != entropy(scores, settings)).any()

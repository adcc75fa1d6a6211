"""One uniform number gives one token, also in deterministic mode on CUDA, however the probabilities are summed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl_mcore.rollout.sampling import _locate, sample
from kdrl_mcore.vocab_parallel import Support, VocabShard

HOW: dict[str, tuple[float, float, int, float]] = {
    "plain": (1.0, 1.0, 0, 0.0),
    "cool": (0.6, 1.0, 0, 0.0),
    "nucleus": (0.8, 0.7, 0, 0.0),
    "wide nucleus": (1.0, 1.0 - 1e-9, 0, 0.0),
    "greedy": (0.0, 1.0, 0, 0.0),
    "top-k": (1.0, 1.0, 7, 0.0),
    "min-p": (0.9, 1.0, 0, 0.05),
    "min-p, top-k, nucleus": (1.3, 0.8, 12, 0.02),
}


class NoPrefixSums(TorchDispatchMode):
    """Refuse what torch refuses on CUDA in deterministic mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("cumsum", "cumsum_") and args[0].is_floating_point():
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return func(*args, **(kwargs or {}))


def draw(logits_NV: Tensor, uniform_N: Tensor, how: str, real: int) -> tuple[Tensor, Tensor]:
    temperature, *head = HOW[how]
    return sample(logits_NV.clone(), uniform_N, VocabShard(None, 0, logits_NV.size(1), real), temperature, Support(*head))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("columns", [3, 64, 65, 1000, 5000])
def test_tokens_are_those_of_the_cumulative_distribution(columns: int, how: str) -> None:
    """The token by numpy, in the order of the columns; the last column is padding and is never drawn."""
    generator = torch.Generator().manual_seed(columns)
    logits = 3 * torch.randn(40, columns, generator=generator)
    uniform = torch.rand(40, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1.0 - 2.0**-53])
    with NoPrefixSums():
        tokens, log_probs = draw(logits, uniform, how, columns - 1)
    temperature, top_p, top_k, min_p = HOW[how]
    whole = (top_p, top_k, min_p) == (1.0, 0, 0.0)
    for row, u, token, log_prob in zip(logits, uniform.tolist(), tokens.tolist(), log_probs.tolist(), strict=True):
        scaled = (row / temperature if temperature else row)[:-1].double()
        probs = scaled.softmax(0).numpy()
        order = np.arange(columns - 1) if whole else np.argsort(-probs, kind="stable")
        order = order[probs[order] >= min_p * probs.max()][: top_k or None]
        probs = probs / probs[order].sum()
        sums = probs[order].cumsum()
        kept = np.sort(order if top_p == 1 else order[: int(np.searchsorted(sums, top_p)) + 1])
        sums = probs[kept].cumsum()
        mass = sums[-1]
        index = min(int(np.searchsorted(sums, u * mass, side="right")), len(kept) - 1)
        assert token == (int(probs.argmax()) if temperature == 0 else int(kept[index]))
        assert log_prob == pytest.approx(np.log(probs[token] / mass), abs=1e-6)


def test_tokens_without_probability_are_never_drawn() -> None:
    """For every uniform number and rounding: most of the 1000 tokens, also the first and the last, have probability zero."""
    logits = torch.full((1, 1000), -1e4)
    logits[0, [1, 400, 401, 998]] = torch.tensor([0.1, 0.7, 0.2, -30.0])
    uniform = torch.cat((torch.linspace(0, 1, 501, dtype=torch.float64)[:-1], 1 - 2.0 ** -torch.arange(1, 54).double()))
    tokens, log_probs = draw(logits.expand(len(uniform), -1), uniform, "plain", 1000)
    assert set(tokens.tolist()) == {1, 400, 401, 998}
    assert log_probs.isfinite().all()
    assert (tokens[:500].diff() >= 0).all()  # larger numbers give later tokens


@pytest.mark.parametrize(
    ("target", "index", "before"), [(-1.0, 1, 0.0), (0.0, 1, 0.0), (2.0, 3, 2.0), (4.9, 3, 2.0), (9.0, 3, 2.0)]
)
def test_a_target_is_located_among_entries_with_mass(target: float, index: int, before: float) -> None:
    mass = torch.tensor([[0.0, 2.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    found, sum_before = _locate(mass, torch.tensor([target], dtype=torch.float64))
    assert (found.item(), sum_before.item()) == (index, before)

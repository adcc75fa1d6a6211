"""The planner counts the kernels that a layer's modules launch for each token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdrl_mcore.planning.passes import LAYER_KERNELS
from tests.reference.tiny_models import make_qwen2, make_tokenizer
from tests.support.ranks import RankPool

NO_KERNEL = {
    *("alias", "as_strided", "detach", "dropout", "dropout_", "empty", "empty_like", "expand", "flatten", "item", "lift_fresh"),
    *("narrow", "new_empty", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose"),
    *("unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
}
"""Operations without a kernel: views, allocations, and dropout, which does nothing in evaluation."""
LAYERS = 2


class Kernels(TorchDispatchMode):
    """Counts operations by the place where they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.where = "outside"
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        is_cast = name in ("to", "_to_copy")
        result = function(*args, **(kwargs or {}))
        if name not in NO_KERNEL and not (is_cast and result is args[0]):
            self.count[self.where] += 1
        return result


def count_kernels(path: str) -> float:
    """Kernels of one layer for one decoded token of every sequence, through the modules that training also uses."""
    from kdrl_mcore.data.tokenizers import load_tokenizer
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.types import Prompt
    from tests.support.conversion_ranks import build

    parts, kernels = build(path, {}, dtype="bfloat16"), Kernels()
    for layer in parts.chunks[0].decoder.layers:
        layer.register_forward_pre_hook(lambda *_: setattr(kernels, "where", "layer"))
        layer.register_forward_hook(lambda *_: setattr(kernels, "where", "outside"))
    engine = MegatronEngine(parts, load_tokenizer(path), 8, lambda: 0)
    engine._directly = False  # as with Transformer Engine's layers
    engine._is_stop = torch.zeros_like(engine._is_stop)
    prompts = [Prompt(prompt_id="p", text="1+1=", token_ids=np.array([5, 6, 7, 8]), answer="2")]
    counts = []
    for tokens in (4, 9):
        kernels.count.clear()
        with kernels:
            engine.generate(prompts, Sampling(1.0, 1.0, tokens, 2, (1,)))
        counts.append(kernels.count["layer"])
    return (counts[1] - counts[0]) / 5 / LAYERS


def test_a_layer_of_a_decoding_step_has_as_many_kernels_as_are_planned(ranks1: RankPool, tmp_path: Path) -> None:
    make_qwen2(tmp_path, seed=1, num_layers=LAYERS)
    make_tokenizer(tmp_path)
    (counted,) = ranks1.run(count_kernels, str(tmp_path))
    assert counted == pytest.approx(LAYER_KERNELS, rel=0.15)

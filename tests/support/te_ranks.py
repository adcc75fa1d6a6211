"""Ranks whose layers come from the stand-in for Transformer Engine in `tests/support/stubs`; the CPU stands in for a GPU.

A `RankPool` runs the functions named `*_on_rank`; nothing of kdrl_mcore is imported before they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from tests.support.training import Outcome, train_on_rank

STUBS = str(Path(__file__).parent / "stubs")
"""The first entry of `sys.path` in a pool of such ranks."""


def play_transformer_engine() -> None:
    """Prepare a rank: the stand-in is used although there is no GPU."""
    from kdrl_mcore.parallel import mcore

    mcore.why_no_transformer_engine = lambda: None  # type: ignore[assignment]
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    mcore._prepare_local_experts()  # the patches that the token dispatcher needs on a CPU


def under_te_on_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of `conversion_ranks` or of this file with models that use Transformer Engine's layers in float32 too."""
    from tests.support import conversion_ranks

    with patch.object(conversion_ranks, "ModelConfig", partial(conversion_ranks.ModelConfig, spec="transformer_engine")):
        return function(*arguments)


def modules_on_rank(path: str, layout: dict[str, Any]) -> dict[str, str]:
    """The class of each module of a student, by the module's name."""
    from tests.support.conversion_ranks import build

    return {name: type(module).__name__ for name, module in build(path, layout, student=True).chunks[0].named_modules()}


def attention_on_rank(path: str, tensor: int) -> list[Tensor]:
    """How far the attention of Transformer Engine's layers differs from ours, in float32, over packed sequences of several
    lengths: in the output and in the gradients of query, key and value."""
    from tests.support.conversion_ranks import build

    parts = build(path, {"tensor": tensor}, student=True, dtype="bfloat16")
    from megatron.core.transformer.enums import AttnMaskType

    from kdrl_mcore.model.attention import PackedDotProductAttention
    from kdrl_mcore.parallel.packing import pack

    (chunk,), architecture = parts.chunks, parts.architecture
    theirs = chunk.decoder.layers[0].self_attention.core_attention
    assert type(theirs).__name__ == "TEDotProductAttention"
    one = np.zeros(1, dtype=np.int64)
    packed = chunk.pack_batch(pack([(i, one, one.repeat(length - 1)) for i, length in enumerate((2, 2, 7, 2, 3))], 1))
    generator = torch.Generator().manual_seed(0)
    heads = [architecture.num_attention_heads, architecture.num_key_value_heads, architecture.num_key_value_heads]
    layers = [torch.randn(16, count // tensor, architecture.head_dim, generator=generator).requires_grad_() for count in heads]
    results = []
    for attention in (theirs, PackedDotProductAttention(parts.config)):
        out = attention(*layers, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=packed)
        weights = torch.randn(out.numel(), generator=torch.Generator().manual_seed(1))
        results.append([out.flatten(), *torch.autograd.grad((out.flatten() * weights).sum(), layers)])
    return [(mine - other).abs().max() for mine, other in zip(*results, strict=True)]


def refit_on_rank(path: str, layout: dict[str, Any]) -> list[str]:
    """The tensors that this rank sends to an engine and that differ from the folder's in some bit."""
    from tests.reference.tiny_models import read_hf_weights
    from tests.support.conversion_ranks import build

    parts = build(path, layout, student=True)
    from kdrl_mcore.convert.export import hf_tensors, owned_tensors
    from kdrl_mcore.rollout.refit.refit import send_weights

    send_weights(parts, [], 1, 60.0, 10_000, colocated=True)  # refuses a list of tensors that does not fit the architecture
    whole, owned = read_hf_weights(path), owned_tensors(parts)
    sent = {name: tensor for name, tensor in hf_tensors(parts) if tensor is not None and name in owned}
    return [name for name in owned if not torch.equal(sent[name], whole[name])]


def updates_on_rank(overrides: Sequence[str]) -> Outcome:
    """`train_on_rank`; `found` says for each parameter whether its layer added the gradient to the main gradient."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.student.student import Student

    found: dict[str, bool] = {}
    gradient = Student._gradient

    def watched(student: Any, micro_batches: Any) -> Any:
        result = gradient(student, micro_batches)
        for chunk in student.parts.chunks:
            found.update({name: parameter.grad_added_to_main_grad for name, parameter in chunk.named_parameters()})
        return result

    with patch.object(Student, "_gradient", watched):
        outcome = train_on_rank(overrides)
    outcome.found = found
    return outcome

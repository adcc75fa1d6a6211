"""A faked world: one process builds any rank of any world, on tensors without memory, and traces what a layer keeps.

A program that `shards.py` runs: JSON requests on standard input, JSON answers on standard output. A request for a layout that
the model does not fit is answered by the reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config import ModelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.platform import prepare_platform

prepare_platform()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from kdrl_mcore.model import attention, gpt  # noqa: E402
from kdrl_mcore.model.families import read_architecture  # noqa: E402
from kdrl_mcore.model.families.base import Architecture  # noqa: E402
from kdrl_mcore.parallel.layout import Layout, create_student_groups  # noqa: E402
from kdrl_mcore.parallel.packing import pack  # noqa: E402
from kdrl_mcore.planning.live import LiveBytes  # noqa: E402
from kdrl_mcore.planning.shards import LayerMemory, Shard, ShardRequest, Stage  # noqa: E402

TRACED_TOKENS = 1024
"""Of a micro-batch on one rank: enough for what does not grow with tokens to vanish."""


def fake_process_groups() -> None:
    """From now on every process group is a faked one: a rank talks to itself, and no gloo group looks for the others."""
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})


@contextlib.contextmanager
def faked_world(rank: int, world: int) -> Iterator[None]:
    """This process as one rank of a world; `fake_process_groups` must have been called."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_shard(request: ShardRequest) -> Shard:
    """Build the first tensor-parallel rank of every stage, and trace a layer.

    The smallest world that holds the model is enough: data parallelism changes no shard. Every layer of a chunk is alike, so
    that one is built per chunk and counted as many times as there are.

    Raises:
        ConfigError: the model does not fit the layout.
    """
    architecture = read_architecture(request.path)
    layout = _smallest_layout(request)
    gpt.check_layout(architecture, layout, trainable=request.trainable)
    # Stages between the first and the last are alike, and context parallelism changes no weight.
    plain = replace(request, context=1)
    built = {stage: _build_stage(plain, stage) for stage in {0, min(1, request.pipeline - 1), request.pipeline - 1}}
    stages = tuple(built[stage] if stage in built else built[1] for stage in range(request.pipeline))
    layer = _trace_layer(architecture, request.dtype, request.tensor, request.context, request.sequence_parallel)
    groups_here = max(1, architecture.num_key_value_heads // request.tensor)
    size = torch.empty(0, dtype=gpt.DTYPES[request.dtype]).element_size()
    columns = gpt.padded_vocab_size(architecture.vocab_size, request.tensor) // request.tensor
    return Shard(stages, layer, 2 * groups_here * architecture.head_dim * size, columns)


def _smallest_layout(request: ShardRequest) -> Layout:
    per_stage = math.lcm(request.tensor * request.context, request.expert)
    return Layout(
        per_stage * request.pipeline,
        tensor=request.tensor,
        pipeline=request.pipeline,
        context=request.context,
        virtual_pipeline=request.virtual_pipeline,
        sequence_parallel=request.sequence_parallel,
        expert=request.expert,
    )


@cache
def _build_stage(request: ShardRequest, stage: int) -> Stage:
    architecture, layout = read_architecture(request.path), _smallest_layout(request)
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    per_chunk = architecture.num_layers // chunks
    rank = layout.rank(pipeline=stage, data=0)
    with faked_world(rank, layout.world), FakeTensorMode():
        parts = gpt.build_model(
            replace(architecture, num_layers=chunks),
            ModelConfig(dtype=request.dtype, spec="local"),
            create_student_groups(layout),
            vocabulary=architecture.vocab_size,
            trainable=request.trainable,
        )
        names = {name: p for chunk in parts.chunks for name, p in chunk.named_parameters(prefix=str(id(chunk)))}
        in_layers = {name: p.numel() for name, p in names.items() if ".decoder.layers." in name}
        experts = sum(size for name, size in in_layers.items() if ".mlp.experts." in name)
        matrices = sum(p.numel() for name, p in names.items() if ".decoder.layers." in name and p.dim() == 2)
        others = sum(p.numel() for name, p in names.items() if ".decoder.layers." not in name)
        mixture = architecture.experts
        # A rank's experts see, on average, as many tokens as if each token's own experts were here, split over the ranks.
        working = 0 if mixture is None else _active_expert_elements(architecture, layout)
        last = parts.chunks[-1]
        on_last = parts.groups.is_last_stage
        return Stage(
            layers=per_chunk * len(parts.chunks),
            parameters=per_chunk * sum(in_layers.values()) + others,
            experts=per_chunk * experts,
            layer_matrices=(matrices - experts) // len(parts.chunks) + working,
            embedding=parts.chunks[0].embedding.word_embeddings.weight.numel() if parts.chunks[0].pre_process else 0,
            head=last.head_weight().numel() if on_last else 0,
        )


def _active_expert_elements(architecture: Architecture, layout: Layout) -> int:
    """Elements of the experts that a token is multiplied with in one layer, as one rank's share: the ranks that split a
    token's layers (tensor parallelism) have different tokens in the experts."""
    assert architecture.experts is not None
    of_one = 3 * architecture.hidden_size * architecture.experts.ffn_hidden_size
    return architecture.experts.per_token * of_one // layout.tensor


@cache
def _trace_layer(architecture: Architecture, dtype: str, tensor: int, context: int, sequence_parallel: bool) -> LayerMemory:
    """Run one layer forward and backward on tensors without memory.

    The number of tokens of an expert depends on their values: a mixture is traced as a dense layer as wide as the experts of
    one token, which holds the same activations.
    """
    mixture = architecture.experts
    if mixture is not None:
        width = mixture.per_token * mixture.ffn_hidden_size
        architecture = replace(architecture, experts=None, ffn_hidden_size=width, family="Qwen3ForCausalLM")
    layout = Layout(tensor * context, tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    with faked_world(0, layout.world), FakeTensorMode(allow_non_fake_inputs=True):
        groups = create_student_groups(layout)
        parts = gpt.build_model(
            replace(architecture, num_layers=1),
            ModelConfig(dtype=dtype, spec="local"),
            groups,
            vocabulary=architecture.vocab_size,
            trainable=True,
        )
        chunk = parts.chunks[0]
        rows = TRACED_TOKENS
        batch = pack(
            [(0, np.zeros(rows * context - 1, np.int64), np.zeros(1, np.int64))],
            layout.token_alignment,
            context_size=layout.context,
        )
        packed = chunk.pack_batch(batch)
        shape = (rows // layout.replica_alignment, 1, architecture.hidden_size)
        known = (*chunk.parameters(), packed.cos_SD, packed.sin_SD)

        def run(*, keep: bool) -> tuple[LiveBytes, Tensor, int]:
            with LiveBytes(known) as live, torch.set_grad_enabled(keep):
                hidden = torch.zeros(shape, dtype=parts.config.params_dtype, requires_grad=keep)
                size = live.now
                output = chunk.decoder.layers[0](hidden, attention_mask=None, packed_seq_params=packed)[0]
                return live, output, size

        forward, output, input_bytes = run(keep=False)
        del output
        live, output, _ = run(keep=True)
        saved = live.now - output.untyped_storage().nbytes()
        for parameter in chunk.parameters():  # as Megatron's DDP does once a gradient is in its buffer
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with live:
            output.backward(torch.zeros_like(output))
        largest = max(p.numel() * p.element_size() for p in chunk.decoder.layers[0].parameters())
    return LayerMemory(*(size / rows for size in (input_bytes, saved, forward.peak, live.peak - largest)))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _prepare() -> None:
    fake_process_groups()
    # Nothing here draws random numbers, and comparing states that hold no values fails.
    CudaRNGStatesTracker.fork = lambda self, *args, **kwargs: contextlib.nullcontext()
    gpt.LanguageModel.to = lambda self, *args, **kwargs: self  # everything is where it shall be
    # A tensor subclass that cannot be faked; flash attention needs no mask.
    attention.causal_lower_right = lambda *_: None  # type: ignore[assignment]


def main() -> None:
    """Answer the requests on standard input."""
    _prepare()
    answers: list[dict | str] = []
    for fields in json.load(sys.stdin):
        try:
            answers.append(asdict(build_shard(ShardRequest(**fields))))
        except ConfigError as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

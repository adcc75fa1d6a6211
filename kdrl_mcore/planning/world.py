"""A fake world: one process builds any rank of any world with tensors that have no memory, and traces what a layer keeps.

`shards.py` runs this as a program: JSON requests on standard input, JSON answers on standard output. If a model does not fit
the requested layout, the answer is the reason.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kdrl_mcore.config import ModelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.platform import prepare_platform

prepare_platform()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from kdrl_mcore.model import attention, gpt  # noqa: E402
from kdrl_mcore.model.activations import Activations  # noqa: E402
from kdrl_mcore.model.families import read_architecture  # noqa: E402
from kdrl_mcore.model.families.base import Architecture  # noqa: E402
from kdrl_mcore.model.lora import ADAPTER  # noqa: E402
from kdrl_mcore.model.offload import offloaded_modules  # noqa: E402
from kdrl_mcore.parallel.layout import Layout, create_student_groups  # noqa: E402
from kdrl_mcore.parallel.packing import pack  # noqa: E402
from kdrl_mcore.planning.live import LiveBytes  # noqa: E402
from kdrl_mcore.planning.shards import LayerMemory, Shard, ShardRequest, Stage, lora_config  # noqa: E402

TRACED_TOKENS = 1024
"""The tokens of the traced micro-batch on one rank, enough to make memory that does not grow with them negligible."""
FEW = 32
"""Saved tensors with fewer elements per token count as too small to be off-loaded."""


def fake_process_groups() -> None:
    """Make every process group from now on a fake one: its collectives return at once, and no gloo group waits for other
    ranks."""
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})


@contextlib.contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Run as one rank of a fake world; call `fake_process_groups` first."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_shard(request: ShardRequest) -> Shard:
    """Build the first tensor-parallel rank of every stage, and trace a layer.

    The smallest world that holds the model is enough, as data parallelism changes no shard. A chunk's layers of one kind are
    alike, so one is built per chunk and counted once for each of them.

    Raises:
        ConfigError: the model does not fit the layout.
    """
    architecture = read_architecture(request.path)
    layout = _smallest_layout(request)
    gpt.check_layout(architecture, layout, trainable=request.trainable)
    # Context parallelism and what is kept change no weight. All stages between the first and the last have the same layers,
    # unless the model mixes kinds of layers.
    plain, last = replace(request, context=1, recomputed=(), offloaded=()), request.pipeline - 1
    alike = {} if architecture.mixes_layers else dict.fromkeys(range(1, last), 1)
    stages = tuple(_build_stage(plain, alike.get(stage, stage)) for stage in range(request.pipeline))
    layer = _layer_memory(architecture, request)
    groups_here = max(1, architecture.num_key_value_heads // request.tensor)
    size = torch.empty(0, dtype=DTYPES[request.dtype]).element_size()
    columns = gpt.padded_vocab_size(architecture.vocab_size, request.tensor) // request.tensor
    return Shard(stages, layer, 2 * groups_here * architecture.head_dim * size, columns)


def _layer_memory(architecture: Architecture, request: ShardRequest) -> LayerMemory:
    """The memory of one layer: what is kept is the mean of all layers, the peaks are those of the largest."""
    experts = [architecture.has_experts(layer) for layer in range(architecture.num_layers)]
    kinds = {kind: _memory_of_kind(architecture.of_one_kind(experts=kind, num_layers=1), request) for kind in set(experts)}
    kept = ("input", "saved", "host")
    means = {name: statistics.fmean(getattr(kinds[kind], name) for kind in experts) for name in kept}
    peaks = {name: max(getattr(kind, name) for kind in kinds.values()) for name in ("forward", "backward")}
    return LayerMemory(**means, **peaks)


def _memory_of_kind(architecture: Architecture, request: ShardRequest) -> LayerMemory:
    """The memory of one layer of a model whose layers are alike. Off-loaded activations belong to other parts of the layer than
    recomputed ones."""
    traced = TracedLayer(
        *(architecture, request.dtype, request.tensor, request.context, request.sequence_parallel),
        *(request.lora_rank, request.lora_modules, request.lora_parameters),
    )
    memory = _trace(traced, _as_dense(request.recomputed, architecture))
    if "moe_act" in request.recomputed and architecture.experts is not None:  # what the activation function returns is not kept
        width = architecture.experts.per_token * architecture.experts.ffn_hidden_size
        memory = replace(memory, saved=memory.saved - width * DTYPES[request.dtype].itemsize / request.tensor)
    if request.offloaded:
        moved, host = _trace_off_load(traced, _as_dense(request.offloaded, architecture))
        memory = replace(memory, saved=memory.saved - moved, backward=memory.backward - moved, host=host)
    return memory


def _as_dense(names: tuple[str, ...], architecture: Architecture) -> tuple[str, ...]:
    """Parts of a layer by their names in the dense layer that is traced, without those that the layer does not have."""
    own = "mlp" if architecture.experts is None else "moe"
    dense = {"mlp": "", "moe": "", "moe_act": "", own: "mlp"}
    return tuple(sorted({dense.get(name, name) for name in names} - {""}))


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


def _build_stage(request: ShardRequest, stage: int) -> Stage:
    """A stage, from one layer of each kind that it has: with experts, or with an MLP."""
    architecture, layout = read_architecture(request.path), _smallest_layout(request)
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    size = architecture.num_layers // chunks
    held = [
        layer
        for first in range(stage * size, architecture.num_layers, layout.pipeline * size)
        for layer in range(first, first + size)
    ]
    layers, outside, outside_adapters = [], 0, 0
    for layer in held:
        of_layer, outside, outside_adapters = _build_kind(request, stage, architecture.has_experts(layer))
        layers.append(of_layer)
    return replace(
        layers[0],
        layers=len(held),
        parameters=sum(each.parameters for each in layers) + outside,
        experts=sum(each.experts for each in layers),
        layer_matrices=sum(each.layer_matrices for each in layers) // len(held),
        adapters=sum(each.adapters for each in layers) + outside_adapters,
        expert_adapters=sum(each.expert_adapters for each in layers),
    )


@cache
def _build_kind(request: ShardRequest, stage: int, experts: bool) -> tuple[Stage, int, int]:
    """A stage with one layer, with experts or with an MLP, and the numbers of its parameters outside of layers and of those of
    them in adapters; `parameters` are those of the layer."""
    architecture, layout = read_architecture(request.path), _smallest_layout(request)
    if not experts:
        layout = replace(layout, expert=1)
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    rank = layout.rank(pipeline=stage, data=0)
    modules, parameters = request.lora_modules, request.lora_parameters if experts else ()
    with fake_world(rank, layout.world_size), FakeTensorMode():
        parts = gpt.build_model(
            architecture.of_one_kind(experts=experts, num_layers=chunks),
            ModelConfig(dtype=request.dtype, spec="local"),
            create_student_groups(layout),
            vocab_size=architecture.vocab_size,
            lora=lora_config(request.lora_rank if modules or parameters else 0, modules, parameters),
            trainable=request.trainable,
        )
        names = {name: p for chunk in parts.chunks for name, p in chunk.named_parameters(prefix=str(id(chunk)))}
        in_layers = {name: p for name, p in names.items() if ".decoder.layers." in name}

        def of_one_layer(*marks: str) -> int:
            return sum(p.numel() for name, p in in_layers.items() if all(mark in name for mark in marks)) // len(parts.chunks)

        matrices = sum(p.numel() for name, p in in_layers.items() if p.dim() == 2 and ".mlp.experts." not in name)
        # On average a rank's experts process as many tokens as if they were the experts of its own tokens.
        working = _active_expert_elements(architecture, layout) if experts else 0
        last = parts.chunks[-1]
        kind = Stage(
            layers=1,
            parameters=of_one_layer(),
            experts=of_one_layer(".mlp.experts."),
            layer_matrices=matrices // len(parts.chunks) + working,
            embedding=parts.chunks[0].embedding.word_embeddings.weight.numel() if parts.chunks[0].pre_process else 0,
            head=last.head_weight().numel() if parts.groups.is_last_stage else 0,
            adapters=of_one_layer(f".{ADAPTER}."),
            expert_adapters=of_one_layer(f".{ADAPTER}.", ".mlp.experts."),
        )
        outside = {name: p.numel() for name, p in names.items() if name not in in_layers}
        return kind, sum(outside.values()), sum(size for name, size in outside.items() if f".{ADAPTER}." in name)


def _active_expert_elements(architecture: Architecture, layout: Layout) -> int:
    """One rank's share of the expert weights by which a token is multiplied in one layer: tensor-parallel ranks split the other
    matrices, but process different tokens in the experts."""
    assert architecture.experts is not None
    of_one = 3 * architecture.hidden_size * architecture.experts.ffn_hidden_size
    return architecture.experts.per_token * of_one // layout.tensor


@dataclass(frozen=True)
class TracedLayer:
    """One layer of a model in a layout, to be traced.

    The number of tokens routed to an expert depends on their values, which do not exist here: so a mixture of experts is traced
    as a dense layer as wide as the experts of one token, which has the same activations.
    """

    architecture: Architecture
    dtype: str
    tensor: int
    context: int
    sequence_parallel: bool
    lora_rank: int = 0
    lora_modules: tuple[str, ...] = ()
    lora_parameters: tuple[str, ...] = ()

    @contextlib.contextmanager
    def build(self, recomputed: tuple[str, ...] = ()) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """The layer on tensors without memory, and a function that runs it forward, keeping either what the backward pass needs
        or nothing: `run(keep)` returns the live bytes, the output and the bytes of the input."""
        architecture, mixture = self.architecture, self.architecture.experts
        of_experts = {"mlp.experts.gate_up_proj": ("gate_proj", "up_proj"), "mlp.experts.down_proj": ("down_proj",)}
        modules = self.lora_modules
        if mixture is not None:
            modules = (*modules, *(dense for name in self.lora_parameters for dense in of_experts[name]))
            width = architecture.active_ffn_size(0)
            architecture = replace(architecture, experts=None, ffn_hidden_size=width, family="Qwen3ForCausalLM")
        layout = Layout(
            self.tensor * self.context, tensor=self.tensor, context=self.context, sequence_parallel=self.sequence_parallel
        )
        with fake_world(0, layout.world_size), FakeTensorMode(allow_non_fake_inputs=True):
            groups = create_student_groups(layout)
            parts = gpt.build_model(
                replace(architecture, num_layers=1),
                ModelConfig(dtype=self.dtype, spec="local"),
                groups,
                vocab_size=architecture.vocab_size,
                activations=Activations("selective", recomputed) if recomputed else Activations(),
                lora=lora_config(self.lora_rank if modules else 0, modules, ()),
                trainable=True,
            )
            chunk = parts.chunks[0]
            batch = pack(
                [(0, np.zeros(TRACED_TOKENS * self.context - 1, np.int64), np.zeros(1, np.int64))],
                layout.token_alignment,
                context_size=layout.context,
            )
            packed = chunk.pack_batch(batch)
            shape = (TRACED_TOKENS // layout.replica_alignment, 1, architecture.hidden_size)
            known = (*chunk.parameters(), *(factor for pair in packed.rotary for factor in pair))

            def run(*, keep: bool) -> tuple[LiveBytes, Tensor, int]:
                with LiveBytes(known) as live, torch.set_grad_enabled(keep):
                    hidden = torch.zeros(shape, dtype=parts.config.params_dtype, requires_grad=keep)
                    size = live.now
                    output = chunk.decoder.layers[0](hidden, attention_mask=None, packed_seq_params=packed)[0]
                    return live, output, size

            yield chunk.decoder.layers[0], run


@cache
def _trace(traced: TracedLayer, recomputed: tuple[str, ...]) -> LayerMemory:
    """Run the layer forward and backward."""
    with traced.build(recomputed) as (layer, run):
        forward, output, input_bytes = run(keep=False)
        del output
        live, output, _ = run(keep=True)
        saved = live.now - output.untyped_storage().nbytes()
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in trained:  # as in Megatron's DDP once a gradient is in its buffer
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with live:
            output.backward(torch.zeros_like(output))
        largest = max(p.numel() * p.element_size() for p in trained)
    return LayerMemory(*(size / TRACED_TOKENS for size in (input_bytes, saved, forward.peak, live.peak - largest)))


@cache
def _trace_off_load(traced: TracedLayer, offloaded: tuple[str, ...]) -> tuple[float, float]:
    """The bytes per token of the layer's saved activations that leave the device, and those that the host then holds.
    Off-loading a view also frees the rest of its storage, if nothing else needs it."""
    with traced.build() as (layer, run):
        run(keep=False)  # Megatron-Core's buffer for gathered activations stays
        kept = []
        for names in ((), offloaded):
            with _dropping(layer, names) as dropped:
                live, output, _ = run(keep=True)
            kept.append(live.now)
            del output
    return (kept[0] - kept[1]) / TRACED_TOKENS, sum(dropped) / TRACED_TOKENS


@contextlib.contextmanager
def _dropping(layer: nn.Module, names: tuple[str, ...]) -> Iterator[list[int]]:
    """Drop everything that these parts of the layer save, so that no backward pass can follow; yields the bytes of each saved
    storage. The conditions are those of `model/offload.py`, with `FEW` in place of the smallest number of elements."""
    weights = {parameter.untyped_storage() for parameter in layer.parameters()}
    seen: weakref.WeakKeyDictionary[torch.UntypedStorage, set[object]] = weakref.WeakKeyDictionary()
    dropped: list[int] = []
    handles = []

    def save(tensor: Tensor) -> Tensor | None:
        storage, size = tensor.untyped_storage(), tensor.numel() * tensor.element_size()
        if storage in weights or tensor.numel() < FEW * TRACED_TOKENS or size > storage.nbytes():
            return tensor.detach()
        place = None if size == storage.nbytes() else (tensor.storage_offset(), tensor.shape, tensor.stride())
        if place not in seen.setdefault(storage, set()):
            seen[storage].add(place)
            dropped.append(size)
        return None

    def restore(_: object) -> Tensor:
        raise AssertionError("a dropped tensor cannot be used")

    for module in offloaded_modules(layer, names):
        hooks = saved_tensors_hooks(save, restore)
        handles.append(module.register_forward_pre_hook(lambda *_, hooks=hooks: hooks.__enter__()))
        handles.append(module.register_forward_hook(lambda *_, hooks=hooks: hooks.__exit__(None, None, None)))
    yield dropped
    for handle in handles:
        handle.remove()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _prepare() -> None:
    fake_process_groups()
    # Nothing here draws random numbers, and comparing states without values would fail.
    CudaRNGStatesTracker.fork = lambda self, *args, **kwargs: contextlib.nullcontext()
    gpt.LanguageModel.to = lambda self, *args, **kwargs: self  # everything is already in place
    # The mask is a tensor subclass that cannot be faked; flash attention needs none.
    attention.causal_lower_right = lambda *_: None  # type: ignore[assignment]


def main() -> None:
    """Answer the requests on standard input."""
    _prepare()
    answers: list[dict | str] = []
    for fields in json.load(sys.stdin):
        try:
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            answers.append(asdict(build_shard(ShardRequest(**{**fields, **lists}))))
        except ConfigError as error:
            answers.append(str(error))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

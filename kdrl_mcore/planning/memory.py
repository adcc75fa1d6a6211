"""Bytes of one rank by kind, and the phase of the step that needs the most. docs/planning.md has the equations."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch

from kdrl_mcore.config import Config, ParallelConfig
from kdrl_mcore.config.derived import (
    TEACHER,
    compares_over_vocabulary,
    keeps_earlier_weights,
    knows_top_k,
    max_engine_tokens,
    max_sequence_tokens,
    samples,
    shares_teacher_head,
    teaches_itself,
    uses_distributed_optimizer,
)
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.planning.setup import Placed, Setup, make_setup
from kdrl_mcore.planning.workload import Packing, workload_of
from kdrl_mcore.rollout.vllm.gpu_memory import ENGINE_SHARE, RESERVE
from kdrl_mcore.vocab_parallel import VocabShard
from kdrl_mcore.vocab_parallel.engine import default_chunk_tokens

GIB = 2**30
RUNTIME = 1.5 * GIB
"""CUDA context, kernels, cuBLAS and cuDNN workspaces of one process."""
PER_GROUP = 0.15 * GIB
"""NCCL's buffers for one communicator."""
ENGINE_ASLEEP = 2.0 * GIB
"""What a worker of a colocated vLLM engine keeps in addition to its share of the GPU, even asleep: its CUDA context, NCCL's
buffers, CUDA graphs. An estimate, not measured."""
ENGINE_WORK = 1.5 * GIB
"""The part of its share that it needs for one step's activations and logits. An estimate, not measured."""
LEAST_SHARE = 0.05
"""The smallest share of a GPU that is planned for an engine; if less is left, the plan does not fit."""
LAYERS_MOVING = 2
"""The number of layers whose off-loaded activations are on the GPU at once: one computes, and one is being copied."""
ATTENTION = ("qkv_linear", "core_attn", "attn_proj")
"""The parts of a layer that the planner off-loads by its own choice: attention saves few bytes for the time that it takes."""
GLOO_COPY = "gloo's copy"
"""The kind of memory that gloo's reduce-scatter allocates internally, not for a tensor of ours."""
PHASES = ("rollout", "teacher", "head", "backward", "update")


@dataclass(frozen=True)
class Item:
    """Bytes of one kind, and the phases in which they are allocated (empty: always)."""

    kind: str
    bytes: float
    phases: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankMemory:
    """The memory of GPUs with equal loads: those of a pipeline stage, or those of vLLM's servers.

    Attributes:
        name, ranks: which GPUs these are, as text.
        capacity: usable bytes of a GPU; None if unknown.
    """

    name: str
    ranks: str
    items: tuple[Item, ...]
    capacity: float | None

    def at(self, phase: str) -> float:
        """The bytes allocated in a phase."""
        return sum(item.bytes for item in self.items if not item.phases or phase in item.phases)

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> float:
        """The bytes allocated in the fullest phase."""
        return self.at(self.fullest)

    @property
    def between_steps(self) -> float:
        """The bytes that are always allocated."""
        return sum(item.bytes for item in self.items if not item.phases)

    @property
    def fits(self) -> bool:
        """Whether the peak fits."""
        return self.capacity is None or self.peak <= self.capacity


def plan_memory(setup: Setup) -> list[RankMemory]:
    """The memory of every pipeline stage of the student; if the teacher's stages differ, its largest one counts."""
    layout, cluster = setup.student.layout, setup.cluster
    capacity = cluster.memory_gib * GIB * (1 - RESERVE) if cluster.memory_gib else None
    per_stage = layout.world_size // layout.pipeline
    result = []
    for stage in range(layout.pipeline):
        items = [*_training(setup, stage), *_rollout(setup, stage)]
        ranks = f"ranks {stage * per_stage}-{(stage + 1) * per_stage - 1}"
        result.append(RankMemory(f"stage {stage}", ranks, tuple(item for item in items if item.bytes), capacity))
    return result


def _training(setup: Setup, stage: int) -> list[Item]:
    """The items of all phases except generation."""
    return [
        *_state(setup, stage),
        *_activations(setup, stage),
        *_teacher(setup),
        *(_runtime(setup) if setup.cluster.memory_gib else ()),
    ]


def plan_server_memory(setup: Setup) -> list[RankMemory]:
    """The memory of the GPUs of vLLM's servers, if there are any. An engine takes its share of each GPU; all that its weights
    and activations leave of it is KV cache."""
    if setup.engine is None or not setup.engine_gpus:
        return []
    memory = setup.cluster.memory_gib * GIB
    capacity = engine_share(setup) * memory if memory else None
    layout = setup.engine.layout
    return [RankMemory("servers", f"{layout.data} x {layout.tensor} GPUs", tuple(_engine(setup)), capacity)]


def plan_run_memory(config: Config, world_size: int, memory_gib: float) -> list[RankMemory]:
    """The memory of a run on GPUs of this size.

    Raises:
        ConfigError: a layout does not fit its model or the number of ranks.
    """
    config = copy.deepcopy(config)
    config.cluster.memory_gib = memory_gib
    return plan_memory(make_setup(config, workload_of(config), world_size=world_size))


def _state(setup: Setup, stage: int) -> list[Item]:
    """Weights, gradients in float32, and the optimizer's state, which the distributed optimizer divides among the replicas.

    On CPU, gloo reduces the distributed optimizer's gradients in a copy of their buffer, even in a group of one rank. Experts
    have a separate buffer, which is reduced after the other.
    """
    student, settings = setup.student, setup.config.optimizer
    held = student.shard.stages[stage]
    distributed = uses_distributed_optimizer(setup.config)
    shared = _share_of_replicas(setup, stage) if distributed else held.trained
    on_gloo = distributed and not setup.cluster.memory_gib
    reduced = max(held.trained - held.trained_experts, held.trained_experts) if on_gloo else 0
    return [
        Item("weights", held.parameters * student.element),
        Item("gradients", held.trained * 4),
        Item("optimizer", shared * _state_of_a_weight(setup), ("update",) if settings.offload else ()),
        Item(GLOO_COPY, reduced * 4, ("update",)),
    ]


def _share_of_replicas(setup: Setup, stage: int) -> float:
    """A rank's trained parameters divided by the number of replicas that hold the same ones; experts have other replicas."""
    layout, held = setup.student.layout, setup.student.shard.stages[stage]
    experts = held.trained_experts / (layout.world_size // layout.pipeline // layout.expert)
    return (held.trained - held.trained_experts) / (layout.data * layout.context) + experts


def _state_of_a_weight(setup: Setup) -> int:
    """Bytes of optimizer state per weight: the moments, and for a 16-bit weight its copy in float32."""
    return {"adam": 8, "sgd": 0}[setup.config.optimizer.name] + (4 if setup.student.element == 2 else 0)


def checkpoint_bytes(setup: Setup) -> float:
    """The bytes that a rank of the fullest stage saves: its share of weights and optimizer state, distributed or not."""
    shares = [_share_of_replicas(setup, stage) for stage in range(setup.student.layout.pipeline)]
    saved = earlier_bytes(setup) if setup.config.teacher.weights != "start" else 0.0
    return max(shares) * (setup.student.element + _state_of_a_weight(setup)) + saved


def earlier_bytes(setup: Setup) -> float:
    """The bytes of a rank's share of the student's earlier weights, in float32, on the fullest stage; 0 where it keeps none."""
    if not keeps_earlier_weights(setup.config):
        return 0.0
    stages = range(setup.student.layout.pipeline)
    sharded = uses_distributed_optimizer(setup.config)
    shares = (_share_of_replicas(setup, stage) if sharded else setup.student.shard.stages[stage].trained for stage in stages)
    return 4 * max(shares)


def _activations(setup: Setup, stage: int) -> list[Item]:
    """What the forward pass saves, what the backward pass of one layer needs in addition, and the output head."""
    student = setup.student
    layout, layer, packed = student.layout, student.shard.layer, setup.update_packing
    tokens = max(packed.largest, layout.token_alignment)
    waiting = kept_micro_batches(layout.pipeline, stage, packed.micro_batches, layout.virtual_pipeline)
    layers = student.shard.stages[stage].layers
    full = setup.config.parallel.recompute == "full"
    kept = waiting * layers * tokens * (layer.input if full else layer.saved)
    more = tokens * (layer.backward if full else max(0.0, layer.backward - layer.saved))
    moving = min(LAYERS_MOVING, waiting * layers) * tokens * layer.host
    items = [
        Item("activations", kept, ("head", "backward")),
        Item("off-loaded activations", moving, ("head", "backward")),
        Item("backward of a layer", more, ("backward",)),
    ]
    if stage == layout.pipeline - 1:
        exact = compares_over_vocabulary(setup.config.objective) and not knows_top_k(setup.config)
        items.append(Item("logits head", head_bytes(student, tokens, setup, train=True, exact=exact), ("head",)))
        if exact:
            own = 0 if shares_teacher_head(setup.config) else student.shard.columns * setup.teacher_width * student.element
            items.append(Item("teacher head", own))
    return items


def offloaded_bytes(setup: Setup) -> float:
    """The bytes of activations that a rank of the fullest stage has in host memory, not rounded up to powers of two."""
    student = setup.student
    layout, packed = student.layout, setup.update_packing
    tokens = max(packed.largest, layout.token_alignment)
    kept = (
        kept_micro_batches(layout.pipeline, stage, packed.micro_batches, layout.virtual_pipeline) * held.layers
        for stage, held in enumerate(student.shard.stages)
    )
    return max(kept) * tokens * student.shard.layer.host


def leaves_attention(parallel: ParallelConfig) -> bool:
    """Whether selective recompute, if it is on, covers nothing of `ATTENTION`."""
    return not {"core_attn", "layernorm"} & set(parallel.recompute_modules)


def kept_micro_batches(pipeline: int, stage: int, micro_batches: int, virtual: int | None) -> float:
    """The number of micro-batches whose activations a stage keeps, in whole micro-batches of all its chunks: by the 1F1B
    schedule (arXiv 2006.09503), or the interleaved one (arXiv 2104.04473)."""
    if virtual is None:
        return min(pipeline - stage, micro_batches)
    warm_up = (pipeline - stage - 1) * 2 + (virtual - 1) * pipeline + 1
    return min(warm_up, micro_batches * virtual) / virtual


def head_bytes(model: Placed, tokens: int, setup: Setup, *, train: bool, exact: bool = False) -> float:
    """The bytes for one pass over the output head: the logits of one chunk, and in training dW (in float32 and, at the end, in
    the weight's type) and dX. Every token counts as a loss row."""
    layout, columns, hidden = model.layout, model.shard.columns, model.architecture.hidden_size
    cuda = setup.cluster.memory_gib > 0
    rows = default_chunk_tokens(VocabShard(None, 0, columns, columns), torch.device("cuda" if cuda else "cpu"))
    # Triton's kernels keep only the output of the matrix product; the torch path keeps logits and exponentials in float32.
    buffers = model.element if cuda else 8 + (2 if model.element == 2 else 0)
    if exact:
        buffers += model.element if cuda else 4
    chunk = min(rows, max(1, tokens)) * columns * buffers
    gathered = tokens * hidden * model.element if layout.sequence_parallel else 0
    if not train:
        return chunk + gathered
    trained = not model.shard.stages[-1].adapters
    d_weight = columns * hidden * (4 + (2 if model.element == 2 else 0)) if trained else 0
    return chunk + gathered + d_weight + 2 * tokens * hidden * model.element


def _teacher(setup: Setup) -> list[Item]:
    """The weights of the teachers, off-loaded to host memory while idle or always on the GPU, and their forward passes; the
    reference likewise. Several teachers take turns, so of those that are off-loaded only one is on the GPU at a time."""
    items = []
    if teaches_itself(setup.config):
        if not (setup.config.teacher.offload and setup.cluster.memory_gib):
            items.append(Item("earlier weights", earlier_bytes(setup)))
    else:
        held = {name: largest_stage_bytes(teacher) for name, teacher in setup.teachers.items()}
        items += [Item(_of(name, "teacher"), held[name]) for name in held if not setup.offloads(name)]
        moving = [held[name] for name in held if setup.offloads(name)]
        items += [Item("teacher", max(moving), ("teacher",))] if moving else []
    passes = [_scoring(teacher, setup.teacher_packings[name], setup) for name, teacher in setup.teachers.items()]
    if passes:
        items.append(Item("teacher's activations", max(passes), ("teacher",)))
    if setup.reference and not setup.student.shard.stages[0].adapters:  # otherwise it is the student without them
        student = setup.student
        items.append(Item("reference", max(stage.parameters for stage in student.shard.stages) * student.element))
        if setup.config.teacher.offload:
            items[-1] = Item("reference", items[-1].bytes, ("reference",))
    return items


def largest_stage_bytes(model: Placed) -> float:
    """The bytes of the weights of a model's largest stage."""
    return max(stage.parameters for stage in model.shard.stages) * model.element


def teacher_host_bytes(setup: Setup) -> float:
    """The bytes that a rank keeps of off-loaded teachers in host memory."""
    if teaches_itself(setup.config) or not setup.cluster.memory_gib:
        return 0.0
    return sum(largest_stage_bytes(teacher) for name, teacher in setup.teachers.items() if setup.offloads(name))


def _of(teacher: str, what: str) -> str:
    return what if teacher == TEACHER else f"{what} {teacher}"


def _scoring(model: Placed, packed: Packing, setup: Setup) -> float:
    tokens = packed.largest
    return tokens * model.shard.layer.forward + head_bytes(model, tokens, setup, train=False)


def _rollout(setup: Setup, stage: int) -> list[Item]:
    """The memory of generation on a GPU that trains: the embedded engine's KV cache, or a colocated vLLM engine."""
    if not samples(setup.config) or setup.engine_gpus:
        return []
    if setup.engine is not None:
        return _engine(setup)
    student = setup.student
    sequences = min(
        setup.config.rollout.max_sequences,
        -(-setup.workload.responses // (student.layout.data * student.layout.context)),
    )
    columns = max_sequence_tokens(setup.config.rollout)
    cache: float = sequences * columns * student.shard.stages[stage].layers * student.shard.kv_bytes
    return [Item("KV cache", cache, ("rollout",))]


def _engine(setup: Setup) -> list[Item]:
    assert setup.engine is not None
    on_gpu = setup.cluster.memory_gib > 0
    return [
        Item("sleeping engine", ENGINE_ASLEEP if on_gpu and not setup.engine_gpus else 0),
        Item("rollout engine", engine_bytes(setup), ("rollout",)),
        Item("KV cache", engine_cache_bytes(setup), ("rollout",)),
    ]


def engine_cache_bytes(setup: Setup) -> float:
    """The bytes of KV cache on one GPU of a vLLM engine: what weights and activations leave of its share, but at least one
    response of full length, without which vLLM does not start."""
    memory = setup.cluster.memory_gib * GIB
    left = engine_share(setup) * memory - engine_bytes(setup) if memory else setup.config.rollout.vllm.kv_cache_gib * GIB
    return max(left, _longest_response_bytes(setup))


def engine_bytes(setup: Setup) -> float:
    """The bytes of weights, and on a GPU of activations, of one worker of a vLLM engine."""
    assert setup.engine is not None
    work = ENGINE_WORK if setup.cluster.memory_gib else 0
    return setup.engine.shard.stages[0].parameters * setup.engine.element + work


def _longest_response_bytes(setup: Setup) -> float:
    """The bytes of keys and values of one response of full length with its prompt, on one GPU of an engine."""
    assert setup.engine is not None
    shard = setup.engine.shard
    return max_engine_tokens(setup.config) * shard.stages[0].layers * shard.kv_bytes


def engine_share(setup: Setup) -> float:
    """The share that a vLLM engine takes of each of its GPUs: `rollout.vllm.gpu_memory_utilization`, or by default what
    training leaves, at most `ENGINE_SHARE`."""
    given = setup.config.rollout.vllm.gpu_memory_utilization
    return fitting_share(setup) if given is None else given


def fitting_share(setup: Setup) -> float:
    """The share of a GPU that an engine can take, at most `ENGINE_SHARE`. If it shares GPUs with training, this is what remains
    of the fullest GPU with all that training keeps there during sampling, rounded down to a hundredth."""
    memory = setup.cluster.memory_gib * GIB
    if setup.engine is None or setup.engine_gpus or not memory:
        return ENGINE_SHARE
    stages = range(setup.student.layout.pipeline)
    kept = max(sum(item.bytes for item in _training(setup, stage) if not item.phases) for stage in stages) + ENGINE_ASLEEP
    share = math.floor(100 * (1 - RESERVE - kept / memory)) / 100
    return min(ENGINE_SHARE, max(LEAST_SHARE, share))


def fit_engine(setup: Setup) -> Setup:
    """The same run, with colocated engines that take no more of a GPU than training leaves, and no more than is configured."""
    if setup.engine is None or setup.engine_gpus or not setup.cluster.memory_gib:
        return setup
    config = copy.deepcopy(setup.config)
    config.rollout.vllm.gpu_memory_utilization = min(engine_share(setup), fitting_share(setup))
    return replace(setup, config=config)


def plan_engine_share(config: Config, world_size: int, memory_gib: float) -> float:
    """`engine_share` of a run with colocated engines on GPUs of this size.

    Raises:
        ConfigError: a layout does not fit its model or the number of ranks, or training leaves too little for an engine.
    """
    config = copy.deepcopy(config)
    config.cluster.memory_gib = memory_gib
    setup = make_setup(config, workload_of(config), world_size=world_size)
    share, needs = engine_share(setup), engine_bytes(setup) + _longest_response_bytes(setup)
    if config.rollout.vllm.gpu_memory_utilization is None and share * memory_gib * GIB < needs:
        raise ConfigError(
            f"training leaves {share:.0%} of {memory_gib:.0f} GiB to a colocated engine with rollout.vllm.tensor="
            f"{config.rollout.vllm.tensor}, which needs {needs / GIB:.1f} GiB for its weights and one response of full length: "
            "raise rollout.vllm.tensor, train on more GPUs, or set rollout.vllm.placement=server"
        )
    return share


def _runtime(setup: Setup) -> list[Item]:
    layout = setup.student.layout
    sizes = [layout.tensor, layout.pipeline, layout.data, layout.context, layout.expert, layout.data * layout.context]
    for teacher in setup.teachers.values():
        sizes += [teacher.layout.tensor, teacher.layout.pipeline, teacher.layout.data]
    return [Item("communication", PER_GROUP * sum(size > 1 for size in sizes)), Item("CUDA", RUNTIME)]

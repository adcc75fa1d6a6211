"""The planner's view of a run: models in their layouts, the cluster, and the work of one step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kdrl_mcore.config import ClusterConfig, Config, domain_name
from kdrl_mcore.config.derived import (
    DOMAIN,
    TEACH_INCORRECT,
    TEACHER,
    asks_for_transformer_engine,
    loaded_teachers,
    num_given,
    samples_with_vllm,
    section_of,
    servers_per_node,
    teacher_heads,
    teacher_prompt_tokens,
    teaches_by_advantage,
    teaches_itself,
    training_ranks,
    uses_reference,
)
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.objective.token_weights import scored_tokens
from kdrl_mcore.parallel.layout import Layout, student_layout, teacher_layout
from kdrl_mcore.parallel.micro_batches import Shape
from kdrl_mcore.planning.shards import Shard, ShardRequest, find_shape, get_shards
from kdrl_mcore.planning.workload import Packing, Workload, packing


@dataclass(frozen=True)
class Placed:
    """A model in its layout."""

    architecture: Architecture
    layout: Layout
    shard: Shard
    element: int  # bytes of a weight and of an activation

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model, vocabulary padding included, without adapters."""
        architecture, layout = self.architecture, self.layout
        stages = self.shard.stages
        experts = sum(stage.experts - stage.expert_adapters for stage in stages)
        shared = (sum(stage.parameters - stage.adapters for stage in stages) - experts) * layout.tensor
        doubled = self.shard.stages[-1].head * layout.tensor if architecture.tied_embeddings and layout.pipeline > 1 else 0
        return shared + experts * layout.expert - doubled


@dataclass(frozen=True)
class Choices:
    """Design choices of other trainers, whose published runs are planned too, that no key of the configuration covers.

    Attributes:
        fp8: matrix products are in FP8.
        overlap_tensor: matrix products hide tensor-parallel communication (Transformer Engine's user buffers).
        sorted_by_length: neighbouring micro-batches have similar lengths, as with this trainer's packing.
        fused_head: log-probs are computed in chunks that kernels read as few times as possible, as in this trainer; otherwise
            logits are materialised.
    """

    fp8: bool = False
    overlap_tensor: bool = False
    sorted_by_length: bool = True
    fused_head: bool = True


@dataclass(frozen=True)
class Engines:
    """vLLM's engines.

    Attributes:
        count: the number of engines.
        tensor: GPUs per engine.
        own_gpus: GPUs that only generate, including idle ones on server nodes; 0 if the engines share GPUs with training.
    """

    count: int
    tensor: int
    own_gpus: int


@dataclass(frozen=True)
class Setup:
    """The inputs of the planner's equations."""

    config: Config
    workload: Workload
    choices: Choices
    student: Placed
    teachers: Mapping[str, Placed]  # by name; the only one is called TEACHER
    engine: Placed | None  # vLLM's copy of the student
    engine_gpus: int  # GPUs that only generate
    reference: bool

    @property
    def cluster(self) -> ClusterConfig:
        """The cluster's description."""
        return self.config.cluster

    @property
    def gpus(self) -> int:
        """The number of GPUs that are paid for."""
        teachers = self.cluster.teacher_nodes * self.cluster.gpus_per_node
        return self.student.layout.world_size + self.engine_gpus + teachers

    @property
    def teacher(self) -> Placed | None:
        """The only teacher, or the first of several; None without one."""
        return next(iter(self.teachers.values()), None)

    @cached_property
    def teacher_width(self) -> int:
        """The sum of the hidden sizes of the teachers whose output heads the student holds."""
        if teaches_itself(self.config):
            return self.student.architecture.hidden_size
        heads = teacher_heads(self.config).items()
        paths = [find_shape(each.path, f"{section_of(self.config, name)}.path") for name, each in heads]
        return sum(read_architecture(path).hidden_size for path in paths)

    def offloads(self, name: str) -> bool:
        """Whether a teacher's weights are in host memory while it is idle."""
        return (self.config.teachers[name] if self.config.teachers else self.config.teacher).offload

    def taught_share(self, name: str) -> float:
        """The share of the prompts that a teacher teaches, by the weights of the domains; 1 if that is unknown."""
        sources = {domain_name(source): source.weight for source in self.config.data.sources}
        settings = self.config.teachers.get(name)
        if settings is None or not settings.values or settings.column != DOMAIN or not sources:
            return 1.0
        return sum(weight for domain, weight in sources.items() if domain in settings.values) / sum(sources.values())

    @property
    def updates(self) -> int:
        """The number of optimizer updates per step."""
        return self.config.batch.updates_per_step

    @property
    def samplings(self) -> int:
        """How many times a step samples `prompts_per_step` prompts, if groups without signal are replaced. It assumes that
        every response is correct independently, with the workload's probability. Problems differ, so this is a lower bound."""
        needed = math.ceil(1 / max(self._with_signal, 1e-6) - 1e-9)
        return min(needed, 1 + self.config.rollout.group_filter.rounds)

    @property
    def _with_signal(self) -> float:
        """The share of the groups with correct and incorrect responses, under the same assumption."""
        size, correct = self.config.rollout.responses_per_prompt, self.workload.correct
        return 1 - correct**size - (1 - correct) ** size

    @property
    def distilled(self) -> float:
        """The share of the sampled responses that the teacher scores; with the group mask an upper bound."""
        objective = self.config.objective
        masked = objective.kd.mask in ("response", "group") or objective.combine.kind in TEACH_INCORRECT
        kept = 1 - self.workload.correct if masked else 1.0
        return min(kept, self._with_signal) if teaches_by_advantage(objective) else kept

    @cached_property
    def trained(self) -> Workload:
        """The sampled responses of a step and its given ones, which are assumed to be equally long."""
        sampled = self.workload.responses
        return replace(self.workload, responses=sampled + num_given(self.config, sampled))

    @property
    def sharing(self) -> int:
        """How many responses share the rows of their prompt in training and scoring."""
        return self.config.rollout.responses_per_prompt if self.config.batch.share_prompts else 1

    @cached_property
    def update_packing(self) -> Packing:
        """The packing of one optimizer update."""
        return self._packing(self.student, self.trained.shapes(self.sharing)[:: self.updates])

    @cached_property
    def scoring_packing(self) -> Packing:
        """The packing of a forward pass of the student over the whole batch."""
        return self._packing(self.student, self.trained.shapes(self.sharing))

    def read_by(self, name: str) -> Workload:
        """What is trained on as a teacher reads it: its prompts may be longer, by at most the difference of the limits."""
        longer = teacher_prompt_tokens(self.config, name) - self.config.rollout.max_prompt_tokens
        return replace(self.trained, prompt_tokens=max(0, self.trained.prompt_tokens + longer))

    @cached_property
    def teacher_packings(self) -> dict[str, Packing]:
        """The packing of each teacher's pass."""
        return {name: self._teacher_packing(name) for name in self.teachers}

    def _teacher_packing(self, name: str) -> Packing:
        """The packing of a teacher's pass over the given responses and those that the mask keeps, as far as it teaches their
        prompts, up to the last token with a weight."""
        lengths_N = torch.from_numpy(self.trained.lengths_N)
        scored_N = scored_tokens(self.config.objective.kd.token_weight, lengths_N, torch.ones_like(lengths_N, dtype=torch.bool))
        shapes = self.read_by(name).shapes(self.sharing)
        every = [shape._replace(response=tokens) for shape, tokens in zip(shapes, scored_N.tolist(), strict=True)]
        sampled = self.workload.responses
        kept = max(1, round(sampled * self.distilled)) + len(every) - sampled
        kept = max(1, round(kept * self.taught_share(name)))
        return self._packing(self.teachers[name], tuple(every[index * len(every) // kept] for index in range(kept)))

    def _packing(self, model: Placed, shapes: tuple[Shape, ...]) -> Packing:
        tokens, ordered = self.config.batch.micro_tokens, self.choices.sorted_by_length
        return packing(shapes, model.layout, tokens, sorted_by_length=ordered)


def find_engines(config: Config, world_size: int) -> Engines | None:
    """The engines that `rollout.vllm` starts for `world_size` training ranks; None if the run samples without vLLM.

    Raises:
        ConfigError: they do not fit their GPUs.
    """
    if not samples_with_vllm(config):
        return None
    settings, cluster = config.rollout.vllm, config.cluster
    here = min(world_size, cluster.gpus_per_node)
    if cluster.server_nodes:  # the launcher fills each with engines (slurm/settings.py)
        count = cluster.server_nodes * servers_per_node(config, cluster.gpus_per_node)
        return Engines(count, settings.tensor, cluster.server_nodes * cluster.gpus_per_node)
    if settings.placement == "server":
        count = max(1, settings.replicas, len(settings.servers))
        return Engines(count, settings.tensor, count * settings.tensor)
    if here % settings.tensor or settings.replicas > world_size // settings.tensor:
        raise ConfigError(
            f"colocated engines of rollout.vllm.tensor={settings.tensor} do not fit {world_size} ranks on nodes of {here} GPUs"
            + (f" {settings.replicas} times (rollout.vllm.replicas)" if settings.replicas else "")
            + ": change it, or set rollout.vllm.placement=server"
        )
    return Engines(settings.replicas or world_size // settings.tensor, settings.tensor, 0)


def shard_requests(config: Config, world_size: int) -> dict[str, ShardRequest]:
    """The shards that a plan for `world_size` training ranks needs, by role: "student", and if there are any "teacher" (of
    several "teacher NAME") and "engine".

    Raises:
        ConfigError: a model is not found, or the student does not have a part that is to be recomputed or off-loaded.
    """
    parallel, student = config.parallel, find_shape(config.student.path, "student.path")
    lora = config.student.lora
    Activations.of(parallel).check(read_architecture(student), transformer_engine=asks_for_transformer_engine(config.model))
    requests = {
        "student": ShardRequest(
            student,
            config.model.dtype,
            parallel.tensor,
            parallel.pipeline,
            parallel.virtual_pipeline,
            parallel.context,
            parallel.expert,
            parallel.sequence_parallel,
            recomputed=tuple(parallel.recompute_modules) if parallel.recompute == "selective" else (),
            offloaded=tuple(parallel.offload_activations),
            lora_rank=lora.rank,
            lora_modules=tuple(lora.target_modules) if lora.rank else (),
            lora_parameters=tuple(lora.target_parameters),
        )
    }
    for name, settings in loaded_teachers(config).items():
        teacher, layout = find_shape(settings.path, f"{section_of(config, name)}.path"), settings.parallel
        requests[_role(name)] = ShardRequest(
            teacher, config.model.dtype, layout.tensor, layout.pipeline, expert=layout.expert, trainable=False
        )
    engines = find_engines(config, world_size)
    if engines is not None:
        # vLLM splits each expert over its GPUs, which then hold as many elements as if each had whole experts.
        expert = engines.tensor if read_architecture(student).experts else 1
        requests["engine"] = ShardRequest(student, config.model.dtype, engines.tensor, expert=expert, trainable=False)
    return requests


def _role(teacher: str) -> str:
    return TEACHER if teacher == TEACHER else f"teacher {teacher}"


def make_setup(
    config: Config,
    workload: Workload,
    choices: Choices = Choices(),
    *,
    world_size: int | None = None,
    build: Callable[[Sequence[ShardRequest]], Sequence[Shard]] = get_shards,
) -> Setup:
    """The planner's inputs for a run, with the shards of its models.

    Args:
        world_size: the number of training ranks; None takes all GPUs of the cluster's training nodes.
        build: builds the shards.

    Raises:
        ConfigError: a layout does not fit its model or the number of GPUs.
    """
    world_size = training_ranks(config.cluster) if world_size is None else world_size
    requests, engines = shard_requests(config, world_size), find_engines(config, world_size)
    shards = dict(zip(requests, build(list(requests.values())), strict=True))
    element = 2 if config.model.dtype == "bfloat16" else 4
    layouts = {"student": student_layout(world_size, config.parallel)}
    loaded = loaded_teachers(config)
    layouts |= {_role(name): teacher_layout(world_size, settings.parallel) for name, settings in loaded.items()}
    if engines is not None:
        layouts["engine"] = Layout(engines.count * engines.tensor, engines.tensor, expert=requests["engine"].expert)
    placed = {
        role: Placed(read_architecture(request.path), layouts[role], shards[role], element)
        for role, request in requests.items()
    }
    return Setup(
        config,
        workload,
        choices,
        placed["student"],
        {TEACHER: placed["student"]} if teaches_itself(config) else {name: placed[_role(name)] for name in loaded},
        placed.get("engine"),
        0 if engines is None else engines.own_gpus,
        reference=uses_reference(config.objective),
    )

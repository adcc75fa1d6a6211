"""A run as the planner sees it: models in their layouts, the cluster, the work of one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from kdrl_mcore.config import ClusterConfig, Config, can_be_positive
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.families.base import Architecture
from kdrl_mcore.parallel.layout import Layout, student_layout
from kdrl_mcore.planning.shards import Shard, ShardRequest, find_shape, get_shards
from kdrl_mcore.planning.workload import Packing, Workload, packing

OVER_THE_VOCABULARY = ("exact", "top_k", "top_k_unbiased")


@dataclass(frozen=True)
class Placed:
    """A model in its layout."""

    architecture: Architecture
    layout: Layout
    shard: Shard
    element: int  # bytes of a weight and of an activation

    @property
    def parameters(self) -> int:
        """Of the whole model, vocabulary padding included."""
        architecture, layout = self.architecture, self.layout
        shared = sum(stage.parameters - stage.experts for stage in self.shard.stages) * layout.tensor
        experts = sum(stage.experts for stage in self.shard.stages) * layout.expert
        doubled = self.shard.stages[-1].head * layout.tensor if architecture.tied_embeddings and layout.pipeline > 1 else 0
        return shared + experts - doubled


@dataclass(frozen=True)
class Choices:
    """What other trainers, whose published runs are planned as well, do differently: no key of the configuration tells it.

    Attributes:
        fp8: matrix products in FP8.
        overlap_tensor: tensor-parallel communication hidden behind matrix products (Transformer Engine's user buffers).
        sorted_by_length: neighbouring micro-batches are alike in length, as this trainer's packing leaves them.
        fused_head: log-probs in chunks that kernels read as few times as they can, as here; else logits are materialised.
    """

    fp8: bool = False
    overlap_tensor: bool = False
    sorted_by_length: bool = True
    fused_head: bool = True


@dataclass(frozen=True)
class Engines:
    """vLLM's engines.

    Attributes:
        tensor: GPUs of each.
        own_gpus: GPUs that only generate, idle ones of server nodes included; 0 where they share those that train.
    """

    count: int
    tensor: int
    own_gpus: int


@dataclass(frozen=True)
class Setup:
    """Everything the equations read."""

    config: Config
    workload: Workload
    choices: Choices
    student: Placed
    teacher: Placed | None
    engine: Placed | None  # vLLM's own copy of the student
    engine_gpus: int  # that only generate
    reference: bool

    @property
    def cluster(self) -> ClusterConfig:
        """The machine."""
        return self.config.cluster

    @property
    def gpus(self) -> int:
        """That are paid for."""
        return self.student.layout.world + self.engine_gpus

    @property
    def updates(self) -> int:
        """Optimizer updates of one step."""
        return self.config.batch.updates_per_step

    @property
    def distilled(self) -> float:
        """Share of the responses that the teacher scores. With the group mask at most that."""
        return 1.0 if self.config.objective.kd.mask == "none" else 1 - self.workload.correct

    @cached_property
    def update_packing(self) -> Packing:
        """Of one optimizer update."""
        return self._packing(self.student, self.workload.sequences[:: self.updates])

    @cached_property
    def scoring_packing(self) -> Packing:
        """Of a student's forward pass over the whole batch."""
        return self._packing(self.student, self.workload.sequences)

    @cached_property
    def teacher_packing(self) -> Packing:
        """Of the teacher's pass over what the mask keeps."""
        assert self.teacher is not None
        kept = max(1, round(self.workload.responses * self.distilled))
        every = self.workload.sequences
        return self._packing(self.teacher, tuple(every[index * len(every) // kept] for index in range(kept)))

    def _packing(self, model: Placed, sequences: tuple[int, ...]) -> Packing:
        tokens, ordered = self.config.batch.micro_tokens, self.choices.sorted_by_length
        return packing(sequences, model.layout, tokens, sorted_by_length=ordered)


def uses_teacher(config: Config) -> bool:
    """Whether a teacher is loaded."""
    return config.objective.kind != "sft" and can_be_positive(config.objective.beta)


def find_engines(config: Config, world: int) -> Engines | None:
    """Where `rollout.vllm` puts engines beside `world` ranks that train; None where the run samples without vLLM.

    Raises:
        ConfigError: they do not fit the GPUs they are to run on.
    """
    if config.rollout.engine != "vllm" or config.objective.kind == "sft":
        return None
    settings, cluster = config.rollout.vllm, config.cluster
    here = min(world, cluster.gpus_per_node)
    if cluster.server_nodes:  # the launcher fills each with engines (slurm/settings.py)
        if settings.tensor > cluster.gpus_per_node:
            raise ConfigError(
                f"rollout.vllm.tensor={settings.tensor} does not fit a server node of {cluster.gpus_per_node} GPUs: change it"
            )
        count = cluster.server_nodes * (cluster.gpus_per_node // settings.tensor)
        return Engines(count, settings.tensor, cluster.server_nodes * cluster.gpus_per_node)
    if settings.placement == "server":
        count = max(1, settings.replicas, len(settings.servers))
        return Engines(count, settings.tensor, count * settings.tensor)
    if here % settings.tensor or settings.replicas > world // settings.tensor:
        raise ConfigError(
            f"colocated engines of rollout.vllm.tensor={settings.tensor} do not fit {world} ranks on nodes of {here} GPUs"
            + (f" {settings.replicas} times (rollout.vllm.replicas)" if settings.replicas else "")
            + ": change it, or set rollout.vllm.placement=server"
        )
    return Engines(settings.replicas or world // settings.tensor, settings.tensor, 0)


def shard_requests(config: Config, world: int) -> dict[str, ShardRequest]:
    """What must be built to plan a run of `world` training ranks, by role: student, and where there are any teacher and
    engine."""
    parallel, student = config.parallel, find_shape(config.student.path, "student.path")
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
        )
    }
    if uses_teacher(config):
        teacher, layout = find_shape(config.teacher.path, "teacher.path"), config.teacher.parallel
        requests["teacher"] = ShardRequest(
            teacher, config.model.dtype, layout.tensor, layout.pipeline, expert=layout.expert, trainable=False
        )
    engines = find_engines(config, world)
    if engines is not None:
        # vLLM splits each expert over its GPUs, which then hold as much as if each had whole ones.
        expert = engines.tensor if read_architecture(student).experts else 1
        requests["engine"] = ShardRequest(student, config.model.dtype, engines.tensor, expert=expert, trainable=False)
    return requests


def training_world(config: Config) -> int:
    """Ranks that train, one on each GPU of `cluster.nodes`."""
    return config.cluster.nodes * config.cluster.gpus_per_node


def make_setup(
    config: Config,
    workload: Workload,
    choices: Choices = Choices(),
    *,
    world: int | None = None,
    build: Callable[[Sequence[ShardRequest]], Sequence[Shard]] = get_shards,
) -> Setup:
    """Build what a run needs.

    Args:
        world: ranks that train; None takes all GPUs of the cluster's training nodes.

    Raises:
        ConfigError: a layout does not fit its model or the number of GPUs.
    """
    world = training_world(config) if world is None else world
    requests, engines = shard_requests(config, world), find_engines(config, world)
    shards = dict(zip(requests, build(list(requests.values())), strict=True))
    element = 2 if config.model.dtype == "bfloat16" else 4
    layouts = {"student": student_layout(world, config.parallel)}
    if "teacher" in requests:
        teacher = config.teacher.parallel
        layouts["teacher"] = Layout(world, teacher.tensor, teacher.pipeline, expert=teacher.expert)
    if engines is not None:
        layouts["engine"] = Layout(engines.count * engines.tensor, engines.tensor, expert=requests["engine"].expert)
    placed = {
        role: Placed(read_architecture(request.path), layouts[role], shards[role], element)
        for role, request in requests.items()
    }
    sft = config.objective.kind == "sft"
    return Setup(
        config,
        workload,
        choices,
        placed["student"],
        placed.get("teacher"),
        placed.get("engine"),
        0 if engines is None else engines.own_gpus,
        reference=not sft and config.objective.reference_kl.coefficient > 0,
    )

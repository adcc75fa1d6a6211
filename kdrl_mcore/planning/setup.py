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
    """Where the rollout engine runs, which the configuration of training does not tell.

    Attributes:
        rollout_tensor: GPUs of one vLLM engine; None is the student's tensor-parallel size.
        rollout_gpus: GPUs that only generate, beside those that train; 0 is the same GPUs in turn.
        steps_ahead: rollouts may be this many updates old: with GPUs of its own, generation then runs beside training.
        fp8: matrix products in FP8 (published runs use it; this trainer does not).
        overlap_tensor: tensor-parallel communication hidden behind matrix products (Transformer Engine's user buffers).
        sorted_by_length: neighbouring micro-batches are alike in length, as this trainer's packing leaves them.
    """

    rollout_tensor: int | None = None
    rollout_gpus: int = 0
    steps_ahead: int = 0
    fp8: bool = False
    overlap_tensor: bool = False
    sorted_by_length: bool = True


@dataclass(frozen=True)
class Setup:
    """Everything the equations read."""

    config: Config
    workload: Workload
    choices: Choices
    student: Placed
    teacher: Placed | None
    engine: Placed | None  # the rollout engine's own copy of the student
    reference: bool

    @property
    def cluster(self) -> ClusterConfig:
        """The machine."""
        return self.config.cluster

    @property
    def gpus(self) -> int:
        """That are paid for."""
        return self.student.layout.world + self.choices.rollout_gpus

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


def shard_requests(config: Config, world: int, choices: Choices) -> dict[str, ShardRequest]:
    """What must be built to plan a run, by role: student, and where there are any teacher and engine."""
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
        requests["teacher"] = ShardRequest(teacher, config.model.dtype, layout.tensor, layout.pipeline, trainable=False)
    if config.rollout.engine == "vllm":
        tensor = choices.rollout_tensor or parallel.tensor
        if (choices.rollout_gpus or world) % tensor:
            raise ConfigError(f"{choices.rollout_gpus or world} GPUs cannot hold engines of {tensor}: change --rollout-tensor")
        requests["engine"] = ShardRequest(student, config.model.dtype, tensor, trainable=False)
    return requests


def make_setup(
    config: Config,
    workload: Workload,
    choices: Choices,
    *,
    world: int | None = None,
    build: Callable[[Sequence[ShardRequest]], Sequence[Shard]] = get_shards,
) -> Setup:
    """Build what a run needs.

    Args:
        world: ranks that train; None takes all GPUs of the cluster, less those that only generate.

    Raises:
        ConfigError: a layout does not fit its model or the number of GPUs.
    """
    if world is None:
        world = config.cluster.nodes * config.cluster.gpus_per_node - choices.rollout_gpus
    if world < 1:
        raise ConfigError(f"{choices.rollout_gpus} GPUs that only generate leave none to train on")
    requests = shard_requests(config, world, choices)
    shards = dict(zip(requests, build(list(requests.values())), strict=True))
    element = 2 if config.model.dtype == "bfloat16" else 4
    layouts = {"student": student_layout(world, config.parallel)}
    if "teacher" in requests:
        layouts["teacher"] = Layout(world, config.teacher.parallel.tensor, config.teacher.parallel.pipeline)
    if "engine" in requests:
        layouts["engine"] = Layout(choices.rollout_gpus or world, requests["engine"].tensor)
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
        reference=not sft and config.objective.reference_kl.coefficient > 0,
    )

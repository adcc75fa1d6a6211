"""Layouts and process groups. Student and teacher may differ in both, so each model carries its own.

The order of ranks is Megatron's: tensor fastest, then context, data, and pipeline slowest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist

from kdrl_mcore.config import ParallelConfig, TeacherParallelConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.parallel.groups import own_group, shared_with_megatron

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Layout:
    """How one model is distributed over the world. The data-parallel size follows from the other sizes.

    Experts are distributed over `expert` neighbouring ranks of a pipeline stage, across tensor, context and data parallelism;
    each rank holds whole experts (expert tensor parallel size 1).
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    expert: int = 1

    def __post_init__(self) -> None:
        model = self.tensor * self.pipeline * self.context
        if self.world_size % model:
            raise ConfigError(
                f"{self.world_size} ranks cannot hold replicas of tensor {self.tensor} x pipeline {self.pipeline} x context "
                f"{self.context} = {model} ranks: start a multiple of {model}, or change the parallel sizes"
            )
        if (self.world_size // self.pipeline) % self.expert:
            raise ConfigError(
                f"the {self.world_size // self.pipeline} ranks of a pipeline stage cannot be divided by expert parallel size "
                f"{self.expert}: change parallel.expert"
            )

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tensor * self.pipeline * self.context)

    def rank(self, *, pipeline: int, data: int, context: int = 0, tensor: int = 0) -> int:
        """The global rank with these parallel ranks."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    @property
    def token_alignment(self) -> int:
        """The number of tokens of a micro-batch is a multiple of this: context and sequence parallelism split them evenly."""
        return (2 * self.context if self.context > 1 else 1) * self.replica_alignment

    @property
    def replica_alignment(self) -> int:
        """The same where each context-parallel rank has its own sequences, as in generation."""
        return self.tensor if self.sequence_parallel else 1


def student_layout(world_size: int, parallel: ParallelConfig) -> Layout:
    """The student's layout from the configuration."""
    return Layout(
        world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        expert=parallel.expert,
        virtual_pipeline=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence_parallel,
    )


def teacher_layout(world_size: int, parallel: TeacherParallelConfig) -> Layout:
    """The layout of a model that only scores."""
    return Layout(world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, expert=parallel.expert)


@dataclass(frozen=True)
class ModelGroups:
    """One model's layout and its process groups in Megatron-Core's form."""

    layout: Layout
    groups: ProcessGroupCollection

    @property
    def tensor(self) -> dist.ProcessGroup:
        """The group over which this rank's layers are split."""
        return self.groups.tp

    @property
    def pipeline(self) -> dist.ProcessGroup:
        """The group of this rank's pipeline stages."""
        return self.groups.pp

    @property
    def data(self) -> dist.ProcessGroup:
        """The group of the ranks that hold the same shard and train on different sequences."""
        return self.groups.dp

    @property
    def context(self) -> dist.ProcessGroup:
        """The group of the ranks that hold the same shard and train on different tokens of the same sequences."""
        return self.groups.cp

    @property
    def replicas(self) -> dist.ProcessGroup:
        """The group of all ranks that hold the same shard (data x context), one from each replica of the model."""
        return self.groups.dp_cp

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank is the leader of its replica: tensor rank 0 of the last pipeline stage."""
        return self.is_last_stage and self.tensor.rank() == 0


def create_student_groups(layout: Layout) -> ModelGroups:
    """Create the student's groups as Megatron-Core's global state, which its optimizer and checkpoints read. Collective over
    the world."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with shared_with_megatron():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,  # only gathering the optimizer's state would need them
        )
    # Nothing draws random numbers (no dropout), but sequence parallelism and recomputation need the generators to exist.
    model_parallel_cuda_manual_seed(0)
    return ModelGroups(layout, ProcessGroupCollection.use_mpu_process_groups())


def create_scoring_groups(layout: Layout) -> ModelGroups:
    """Create groups for a model that only scores, separate from Megatron-Core's global state. Collective over the world."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    dims = {"tp": "t", "cp": "c", "dp": "d", "pp": "p", "dp_cp": "cd", "mp": "tp", "tp_cp": "tc", "tp_dp_cp": "tdc"}
    for name, axes in dims.items():
        setattr(groups, name, own_group(_ranks_along(layout, axes)))
    pipelines = _ranks_along(layout, "p")
    groups.embd = own_group([sorted({ranks[0], ranks[-1]}) for ranks in pipelines])
    groups.pos_embd = own_group([ranks[:1] for ranks in pipelines])
    stages = np.arange(layout.world_size).reshape(layout.pipeline, -1, layout.expert)
    groups.ep = groups.tp_ep = own_group(stages.reshape(-1, layout.expert).tolist())
    groups.expt_dp = own_group(stages.transpose(0, 2, 1).reshape(-1, stages.shape[1]).tolist())
    groups.expt_tp = own_group([[rank] for rank in range(layout.world_size)])
    groups.tp_ep_pp = own_group(stages.transpose(1, 0, 2).reshape(stages.shape[1], -1).tolist())
    return ModelGroups(layout, groups)


def _ranks_along(layout: Layout, axes: str) -> list[list[int]]:
    """The ranks of all groups that vary along these axes (t, c, d, p) and share the others; each list is ascending."""
    order = "pdct"  # slowest first
    grid = np.arange(layout.world_size).reshape(layout.pipeline, layout.data, layout.context, layout.tensor)
    kept = [axis for axis in order if axis not in axes]
    grid = grid.transpose([order.index(axis) for axis in [*kept, *(axis for axis in order if axis in axes)]])
    return grid.reshape(-1, int(np.prod(grid.shape[len(kept) :]))).tolist()

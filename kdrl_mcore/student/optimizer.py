"""The student's optimizer: Megatron's DDP, which sums gradients, and its (distributed) optimizer, which updates weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from kdrl_mcore.config import Config, OptimizerConfig, ParallelConfig
from kdrl_mcore.config.derived import keeps_earlier_weights, uses_distributed_optimizer
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.gpt import ModelParts, correction_biases
from kdrl_mcore.model.lora import sum_shared_gradients
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.adam import Adam
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.earlier_weights import EarlierWeights
from kdrl_mcore.parallel.host_state import HostState
from kdrl_mcore.parallel.optimizer_state import EARLIER, OPTIMIZER, OPTIMIZER_TENSORS, held_shares, saved_step, sharded_tensors


class Optimizer:
    """The optimizer of one rank's chunks of the student.

    An update is `zero_grad`, the schedule's passes over `ddp` within `reducing_gradients`, `prepare_gradient`, then `step`
    unless something is not finite, `gather_weights` and `leave_device`. The loss is already normalised, so gradients are summed
    over micro-batches and data-parallel ranks and never divided.

    Attributes:
        ddp: the chunks with their gradient buffers.
        megatron: Megatron-Core's optimizer.
    """

    def __init__(self, parts: ModelParts, config: Config) -> None:
        """Collective over the data-parallel group.

        Raises:
            ConfigError: `optimizer.offload` is set, and there is no GPU.
        """
        settings, distributed = config.optimizer, uses_distributed_optimizer(config)
        self._config, self._tensor = parts.config, parts.groups.tensor
        self._clip_grad, self._weight_decay = settings.clip_grad, settings.weight_decay
        self._distributed = distributed
        self._overlaps_gather = config.parallel.overlap_param_gather
        moving = config.model.router_bias_update > 0
        self._biases = [bias for chunk in parts.chunks for bias in correction_biases(chunk)] if moving else []
        self._moved_biases: list[Tensor] = []  # their values after the next step
        self._finite: Tensor | None = None  # whether this rank's updated weights are finite, on the device
        self.ddp = _wrap_in_ddp(parts, config.parallel, distributed=distributed)
        dtype = DTYPES[config.model.dtype]
        self.megatron = _build_optimizer(
            self.ddp, settings, dtype, distributed=distributed, overlap_param_gather=self._overlaps_gather
        )
        if self._overlaps_gather:
            # The hook must not refer to the optimizer: its views of the weights keep their graph, and such a cycle is never
            # collected.
            parts.chunks[-1].register_head_pre_hook(partial(mcore.finish_param_gather, self.ddp[-1]))
            self.gather_weights()
        if settings.offload and not torch.cuda.is_available():
            raise ConfigError("optimizer.offload=true needs a GPU: without one the state is in host memory anyway")
        self._host_state = HostState(self.megatron) if settings.offload else None
        self._teacher = config.teacher
        self._saves_earlier = config.teacher.weights in ("average", "refreshed")  # those of the start are read again
        self._earlier = None
        if keeps_earlier_weights(config):
            self._earlier = EarlierWeights(self.megatron, on_host=config.teacher.offload)

    def zero_grad(self) -> None:
        """Zero the gradients. Called before the first micro-batch."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    @contextmanager
    def earlier_weights(self) -> Iterator[None]:
        """A context in which the model has the weights of `teacher.weights`; afterwards it has the present ones again.
        Collective over the data-parallel group."""
        if self._earlier is None:
            yield
            return
        self.wait_for_weights()
        if self._host_state is not None:
            self._host_state.enter()
        with self._earlier.in_model(self._gather_now):
            yield
        self.leave_device()

    def follow(self, updates: int) -> None:
        """Let the earlier weights follow an update, the `updates`-th. No communication."""
        if self._earlier is not None and self._teacher.weights == "average":
            self._earlier.average(self._teacher.decay)
        elif self._earlier is not None and self._teacher.weights == "refreshed" and updates % self._teacher.refresh_every == 0:
            self._earlier.refresh()

    def _gather_now(self) -> None:
        """Gather the weights that other replicas hold, and wait for them."""
        self.gather_weights()
        self.wait_for_weights()
        if self._distributed and not self._overlaps_gather:
            for chunk in self.ddp:
                chunk.start_param_sync()

    @contextmanager
    def reducing_gradients(self) -> Iterator[None]:
        """Let the schedule reduce gradients after the last micro-batch. For training only: a forward-only schedule enters
        `no_sync` too but never leaves it, so it would end when its generator is collected, possibly during an update."""
        config, no_sync = self._config, [chunk.no_sync for chunk in self.ddp]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        config.finalize_model_grads_func = partial(_reduce_gradients, self._tensor)
        before = [bias.clone() for bias in self._biases]
        try:
            yield
            self._moved_biases = [bias.clone() for bias in self._biases]
        finally:
            for bias, value in zip(self._biases, before, strict=True):
                bias.copy_(value)  # Megatron moves them with the reduction, but an update may be skipped
            config.no_sync_func = config.finalize_model_grads_func = None

    def prepare_gradient(self) -> float:
        """The global norm of the reduced gradient, which is then ready for a step. Collective over the world."""
        if self._host_state is not None:
            self._host_state.enter()
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def gradient_is_finite(self) -> bool:
        """Whether every gradient that this rank holds is finite. The global norm does not suffice: for a weight that
        tensor-parallel ranks replicate, it counts only rank 0's gradient. Not collective."""
        buffers = [buffer for chunk in self.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        return bool(torch.stack([buffer.grad_data.norm() for buffer in buffers]).isfinite().all())

    def step(self, lr: float, grad_norm: float) -> None:
        """Update this rank's share of the weights, and the correction biases of routers (`model.router_bias_update`).

        Args:
            grad_norm: the norm from `prepare_gradient`, used for clipping.
        """
        if self._clip_grad > 0:
            mcore.clip_gradients(self.megatron, self._clip_grad, grad_norm)
        for group in self.megatron.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._weight_decay * group["wd_mult"]
        self.megatron.step_with_ready_grads()
        for bias, value in zip(self._biases, self._moved_biases, strict=True):
            bias.copy_(value)
        self._look_at_weights()

    def weights_are_finite(self) -> bool:
        """Whether the weights that this rank updated or loaded are finite. Not collective: each weight is checked by the rank
        that holds it."""
        return self._finite is None or bool(self._finite)

    @torch.no_grad()
    def gather_weights(self) -> None:
        """Begin to gather the updated weights (after a pass without an update, the present ones). Otherwise Megatron would
        begin in the next forward pass, which may be one that only some ranks run. Collective over the data-parallel group."""
        if self._overlaps_gather:
            self.wait_for_weights()
            for chunk in self.ddp:
                chunk.start_param_sync()

    def wait_for_weights(self) -> None:
        """Under `parallel.overlap_param_gather`, wait for the weights that other ranks updated."""
        if self._overlaps_gather:
            for chunk in self.ddp:
                mcore.finish_param_gather(chunk)

    def leave_device(self) -> None:
        """Move an off-loaded state to host memory until it is needed again."""
        if self._host_state is not None:
            self._host_state.leave()

    def sharded_state(self, weights: dict[str, Any], *, loading: bool) -> dict[str, Any]:
        """The state as Megatron's sharded tensors, to save a checkpoint or to load one into. They are views of this rank's
        state. An off-loaded state is moved to the device, where it stays until `leave_device`.

        Args:
            weights: the sharded tensors of the chunks.
        """
        if self._host_state is not None:
            self._host_state.enter()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        with held_shares(self.megatron):
            state = self.megatron.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        earlier = [] if self._earlier is None or not self._saves_earlier else self._earlier.sharded(weights)
        if loading:
            return {OPTIMIZER_TENSORS: [*sharded_tensors(state), *earlier]}
        return {OPTIMIZER: state, **({EARLIER: dict(enumerate(earlier))} if earlier else {})}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Finish loading a checkpoint whose tensors were loaded in place. Of its scalars only the step count is used; all
        others are this run's."""
        step = saved_step(state[OPTIMIZER])
        if step is not None:
            for group in self.megatron.param_groups:
                group["step"] = step
        self._look_at_weights()

    @torch.no_grad()
    def _look_at_weights(self) -> None:
        """Check this rank's share of the weights, in the optimizer's precision: one reduction on the device, not waited for."""
        weights = [weight for group in self.megatron.param_groups for weight in group["params"] if weight.numel()]
        if weights:
            self._finite = torch.stack(torch._foreach_norm(weights, ord=math.inf)).isfinite().all()


def _wrap_in_ddp(parts: ModelParts, parallel: ParallelConfig, *, distributed: bool) -> list[DistributedDataParallel]:
    """Each chunk with Megatron's gradient buffers. Gradients are kept, and reduced over data-parallel ranks, in float32.

    Args:
        distributed: each data-parallel rank gets only the gradients of its own share of the weights.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=True,  # every bucket is dispatched after the update, not one from another's forward hook
        bucket_size=parallel.bucket_size,
        use_distributed_optimizer=distributed,
    )
    ddp = [
        DistributedDataParallel(parts.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(parts.chunks)
    ]
    for chunk in parts.chunks:
        mcore.fuse_gradient_accumulation(chunk)
    return ddp


def _build_optimizer(
    ddp: list[DistributedDataParallel],
    settings: OptimizerConfig,
    dtype: torch.dtype,
    *,
    distributed: bool,
    overlap_param_gather: bool,
) -> Any:
    """Megatron's optimizer of these chunks' weights, which has float32 main weights where `dtype` is bfloat16.

    Args:
        dtype: the type of the weights.
        distributed: the data-parallel ranks share the optimizer's state, as in `_wrap_in_ddp`.
        overlap_param_gather: `ddp` gathers the updated weights during the next forward pass.
    """
    mcore.use_adam(Adam)
    return mcore.build_optimizer(
        MegatronOptimizerConfig(
            optimizer=settings.name,
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            sgd_momentum=0.0,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap_param_gather,
        ),
        ddp,
    )


def _reduce_gradients(tensor: dist.ProcessGroup, model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by tokens: the loss is normalised already."""
    finalize_model_grads(model, None, **kwargs)
    sum_shared_gradients(model, tensor)

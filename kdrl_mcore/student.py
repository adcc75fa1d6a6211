"""The student: a Megatron model that learns, with Megatron's DDP, (distributed) optimizer and pipeline schedule."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from kdrl_mcore.config import Config
from kdrl_mcore.convert.load import load_weights
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.model.gpt import DTYPES, ModelParts, build_model
from kdrl_mcore.monitoring.profiler import named_range
from kdrl_mcore.monitoring.stopwatch import Stopwatch
from kdrl_mcore.objective.joint import measured_divergences
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.adam import Adam
from kdrl_mcore.parallel.collect import any_rank, sum_over_replicas
from kdrl_mcore.parallel.host_state import HostState
from kdrl_mcore.parallel.layout import create_student_groups, student_layout
from kdrl_mcore.parallel.optimizer_state import held_shares
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.parallel.platform import device, to_device
from kdrl_mcore.teacher_head import TeacherHead
from kdrl_mcore.vocab_parallel import fused_head

Measures = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Scalars measured on some tokens: those that add up over tokens, and those of which the largest counts."""

TokenLoss = Callable[[Tensor, Tensor, Tensor | None, slice], tuple[Tensor, Measures]]
"""(log-probs, entropies, divergences from the teacher or None, which of the micro-batch's loss rows) -> (loss of each token,
measures)."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    Attributes:
        sampler_log_probs_T: log mu of the loss rows; None where the student's present weights sampled them.
        teacher_hidden_DG: the teacher's hidden states of the first D loss rows in host memory, where the loss compares the
            student with it over the vocabulary.
    """

    packed: PackedBatch
    token_loss: TokenLoss
    sampler_log_probs_T: Tensor | None = None
    teacher_hidden_DG: Tensor | None = None


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update.

    Attributes:
        sums, maxima: the measures, over every token of the global batch.
        grad_norm: global norm of the gradient before clipping.
        lr: the learning rate of this update.
        head_seconds: in the output head, of the rank that spent most.
        skipped: why the weights were left untouched (NaN or infinity somewhere), or None.
        gradient_split: where measured, the norms of the GRPO and the distillation gradient and the cosine between them.
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    grad_norm: float
    lr: float
    skipped: str | None
    head_seconds: float = 0.0
    gradient_split: dict[str, float] = field(default_factory=dict)


class Student:
    """The learning model of one rank."""

    def __init__(self, config: Config, world: int, vocabulary: int, on_parameter: Callable[[], None] = lambda: None) -> None:
        """Build and load this rank's shard. Collective over the world.

        Args:
            vocabulary: the number of tokens of the tokenizer; further columns are masked out of the softmax.
            on_parameter: called when the next one is loaded.
        """
        parallel = config.parallel
        layout = student_layout(world, parallel)
        assert config.student.path is not None
        self.groups = create_student_groups(layout)
        self.parts: ModelParts = build_model(
            read_architecture(config.student.path),
            config.model,
            self.groups,
            vocabulary=vocabulary,
            recompute=parallel.recompute,
            trainable=True,
        )
        load_weights(self.parts, config.student.path, on_parameter)
        self.source = config.student.path
        self.version = 0  # optimizer updates the weights have seen
        self._clip_grad = config.optimizer.clip_grad
        self._weight_decay = config.optimizer.weight_decay
        self._temperature = config.rollout.temperature if config.objective.kind == "kdrl" else 1.0
        self._distributed_optimizer = parallel.distributed_optimizer and config.optimizer.name == "adam"
        self.teacher_head: TeacherHead | None = None  # set where the loss compares with a teacher over the vocabulary
        self._head_time = Stopwatch()
        self._build_optimizer(config)

    def _build_optimizer(self, config: Config) -> None:
        parallel = config.parallel
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            align_param_gather=True,  # every bucket is dispatched after the update, not one from another's forward hook
            bucket_size=parallel.bucket_size,
            use_distributed_optimizer=self._distributed_optimizer,
        )
        self.ddp = [
            DistributedDataParallel(self.parts.config, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.parts.chunks)
        ]
        for chunk in self.parts.chunks:
            mcore.fuse_gradient_accumulation(chunk)
        dtype = DTYPES[config.model.dtype]
        settings = config.optimizer
        mcore.use_adam(Adam)
        self.optimizer = mcore.build_optimizer(
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
                use_distributed_optimizer=self._distributed_optimizer,
                overlap_param_gather=parallel.overlap_param_gather,
            ),
            self.ddp,
        )
        self._overlaps_gather = parallel.overlap_param_gather
        if self._overlaps_gather:
            # It must not refer to the optimizer, whose views of the weights keep their graph: such a cycle is never collected.
            self.parts.chunks[-1].before_head = partial(mcore.finish_param_gather, self.ddp[-1])
            self._gather_weights()
        if settings.offload and not torch.cuda.is_available():
            raise ConfigError("optimizer.offload=true needs a GPU: without one the state is in host memory anyway")
        self._host_state = HostState(self.optimizer) if settings.offload else None

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> UpdateResult:
        """One optimizer step on the global batch. Collective over the world.

        Each token's loss arrives already weighted by the global normaliser: gradients are summed over micro-batches and
        data-parallel ranks and divided by nothing. If the loss, a measure or the gradient is NaN or infinite on any rank,
        all ranks leave their weights alone.

        Args:
            micro_batches: this data-parallel rank's, the same number on every rank.
        """
        measures, grad_norm = self._gradient(micro_batches)
        sums, maxima = _add_up(measures)
        sums, maxima = sum_over_replicas(self.groups, sums, {**maxima, "head_seconds": self._head_time.take()})
        head_seconds = maxima.pop("head_seconds")
        skipped = None
        bad = [name for name, value in {**sums, **maxima}.items() if not math.isfinite(value)]
        if any_rank(bool(bad) or not math.isfinite(grad_norm) or not self._gradient_is_finite()):
            skipped = f"{bad[0]} is not finite" if bad else "the gradient is not finite"
        else:
            if self._clip_grad > 0:
                mcore.clip_gradients(self.optimizer, self._clip_grad, grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = self._weight_decay * group["wd_mult"]
            self.optimizer.step_with_ready_grads()
            self.version += 1
        self._gather_weights()
        if self._host_state is not None:
            self._host_state.leave()
        return UpdateResult(sums, maxima, grad_norm, lr, skipped, head_seconds)

    def gradient_norm(self, micro_batches: Sequence[MicroBatch]) -> float:
        """The global norm of the gradient on the global batch; the weights stay as they are. Collective over the world."""
        norm = self._gradient(micro_batches)[1]
        self._gather_weights()
        return norm

    def wait_for_weights(self) -> None:
        """Under `parallel.overlap_param_gather`, wait for what the other ranks have updated. Forward passes do so by
        themselves; whoever reads weights otherwise calls this first."""
        if self._overlaps_gather:
            for chunk in self.ddp:
                mcore.finish_param_gather(chunk)

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Weights and optimizer state as Megatron's sharded tensors: what a checkpoint saves, or the frame one is loaded
        into. They are views of what this rank holds: nothing is copied. An off-loaded optimizer state comes to the device for
        it, until `leave_state`."""
        self.wait_for_weights()
        if self._host_state is not None:
            self._host_state.enter()
        name = "model" if len(self.ddp) == 1 else "model{}"
        model = {
            name.format(index): mcore.weights_to_load(chunk.module) if loading else chunk.module.sharded_state_dict()
            for index, chunk in enumerate(self.ddp)
        }
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        with held_shares(self.optimizer):
            optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
        return {**model, "optimizer": optimizer}

    def leave_state(self) -> None:
        """The snapshot of `sharded_state` is taken, or its frame loaded: an off-loaded optimizer state leaves the device, which
        sampling needs."""
        if self._host_state is not None:
            self._host_state.leave()

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over what `dist_checkpointing.load` returned for `sharded_state(loading=True)`."""
        for index, chunk in enumerate(self.ddp):
            mcore.take_weights(chunk.module, state["model" if len(self.ddp) == 1 else f"model{index}"])
        with held_shares(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        mcore.complete_parameter_groups(self.optimizer)

    @torch.no_grad()
    def _gather_weights(self) -> None:
        """Begin to gather what the ranks have updated, or, after a pass without an update, what they have: Megatron would
        otherwise begin in the next forward pass, which may be one that only some ranks run. Collective over the data-parallel
        group."""
        if self._overlaps_gather:
            self.wait_for_weights()
            for chunk in self.ddp:
                chunk.start_param_sync()

    def _gradient(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Measures], float]:
        """Form the main gradients of the global batch: (this rank's measures, global norm)."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        measures = self._forward_backward(micro_batches)
        if self._host_state is not None:
            self._host_state.enter()
        self.optimizer.prepare_grads()
        return measures, float(self.optimizer.get_grad_norm())

    def _gradient_is_finite(self) -> bool:
        """Whether every gradient that this rank holds is finite. The global norm alone does not tell: of a weight that
        tensor-parallel ranks hold in common it counts rank 0's gradient."""
        buffers = [buffer for chunk in self.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
        return bool(torch.stack([buffer.grad_data.norm() for buffer in buffers]).isfinite().all())

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> list[Measures]:
        """Megatron's schedule over the micro-batches; the measures of each on the last stage."""
        layout = self.groups.layout
        with self._reducing_gradients():
            measures = mcore.forward_backward_function(layout.pipeline, layout.virtual_pipeline)(
                forward_step_func=self._forward_step,
                data_iterator=[iter(micro_batches) for _ in self.ddp],
                model=self.ddp,
                num_microbatches=len(micro_batches),
                seq_length=1,  # only a hint: variable_seq_lengths sends each micro-batch's own shape
                micro_batch_size=1,
                p2p_communicator=P2PCommunicator(self.groups.pipeline, self.parts.config),
                pg_collection=self.groups.groups,
            )
        for chunk in self.ddp:
            chunk.module.set_input_tensor(None)  # the last hidden states that came through the pipeline
        return measures

    @contextmanager
    def _reducing_gradients(self) -> Iterator[None]:
        """The schedule reduces gradients after the last micro-batch. Only while training: a forward-only schedule enters
        `no_sync` too and never leaves it, so that it would end whenever its generator is collected, in mid-update."""
        config, no_sync = self.parts.config, [chunk.no_sync for chunk in self.ddp]
        config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
        config.finalize_model_grads_func = _reduce_gradients
        try:
            yield
        finally:
            config.no_sync_func = config.finalize_model_grads_func = None

    def _forward_step(self, iterator: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        micro = next(iterator)
        chunk, batch = model.module, micro.packed
        hidden = model(
            input_ids=batch.tokens_S[None],
            position_ids=batch.positions_S[None],
            attention_mask=None,
            packed_seq_params=chunk.pack_batch(batch),
        )
        return hidden, partial(self._loss, chunk, micro)

    def _loss(self, chunk: Any, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Measures]:
        measured: list[Measures] = []

        def measured_loss(log_probs: Tensor, entropy: Tensor, divergence: Tensor | None, rows: slice) -> Tensor:
            loss_T, measures = micro.token_loss(log_probs, entropy, divergence, rows)
            measured.append(measures)
            return loss_T

        head: dict[str, Any] = {
            "hidden_SH": hidden.squeeze(1),
            "weight_VH": chunk.head_weight(),
            "rows_T": micro.packed.rows_T,
            "targets_T": micro.packed.targets_T,
            "shard": chunk.shard,
            "temperature": self._temperature,
            "sequence_parallel": self.parts.config.sequence_parallel,
        }
        if micro.teacher_hidden_DG is None:
            with self._head_time(), named_range("head"):
                loss, _, entropy = fused_head(token_loss=partial(_without_teacher, measured_loss), **head)
        else:
            assert self.teacher_head is not None
            teacher_hidden_DG = to_device(micro.teacher_hidden_DG)
            with self._head_time(), named_range("head"):
                outputs = self.teacher_head.compare(
                    teacher_hidden_DG, micro.sampler_log_probs_T, token_loss=measured_loss, **head
                )
            loss, entropy = outputs.loss, outputs.entropies
            distilled = slice(0, micro.packed.num_distilled)
            d_D = outputs.teacher_log_probs[distilled] - outputs.log_probs[distilled]
            measured.append((measured_divergences(d_D, outputs.divergences[distilled]), {}))
        measured.append(({"loss": loss.detach(), "entropy": entropy.sum()}, {}))
        sums, maxima = _merge(measured)
        return loss, torch.zeros((), dtype=torch.int), (sums, maxima)


def _without_teacher(
    loss: Callable[[Tensor, Tensor, Tensor | None, slice], Tensor], log_probs: Tensor, entropy: Tensor, rows: slice
) -> Tensor:
    return loss(log_probs, entropy, None, rows)


def _reduce_gradients(model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by tokens: the loss is normalised already."""
    finalize_model_grads(model, None, **kwargs)


def _merge(measured: Sequence[Measures]) -> Measures:
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    maxima: dict[str, Tensor] = {}
    for added, largest in measured:
        for name, value in added.items():
            sums[name] = sums[name] + value if name in sums else value
        for name, value in largest.items():
            maxima[name] = torch.maximum(maxima[name], value) if name in maxima else value
    return dict(sums), maxima


def _add_up(measured: Sequence[Measures]) -> tuple[dict[str, float], dict[str, float]]:
    """As Python's numbers: the host waits once for all."""
    sums, maxima = _merge(measured)
    values = [*sums.values(), *maxima.values()]
    if not values:
        return {}, {}
    numbers = torch.stack([value.to(device(), torch.float64) for value in values]).tolist()
    return dict(zip(sums, numbers, strict=False)), dict(zip(maxima, numbers[len(sums) :], strict=True))

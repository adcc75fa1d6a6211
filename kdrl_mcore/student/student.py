"""The student: a Megatron model trained with Megatron's pipeline schedule and an optimizer (`optimizer.py`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from kdrl_mcore.config import Config, DistillationConfig
from kdrl_mcore.config.derived import is_supervised, shares_teacher_head, truncates
from kdrl_mcore.convert.load import load_weights
from kdrl_mcore.convert.peft_files import read_peft_folder
from kdrl_mcore.convert.peft_folder import check_student_base, check_teacher_adapters, load_adapters
from kdrl_mcore.model.activations import Activations
from kdrl_mcore.model.families import config_folder, read_architecture
from kdrl_mcore.model.gpt import LanguageModel, ModelParts, build_model
from kdrl_mcore.model.lora import TEACHER_ADAPTER, add_teacher_adapters, initialise_adapters
from kdrl_mcore.model.lora_factors import load_factors, sharded_factors
from kdrl_mcore.monitoring.profiler import named_range
from kdrl_mcore.monitoring.stopwatch import Stopwatch
from kdrl_mcore.objective.joint import measured_divergences
from kdrl_mcore.parallel import mcore
from kdrl_mcore.parallel.collect import any_rank, sum_over_replicas
from kdrl_mcore.parallel.dtypes import DTYPES
from kdrl_mcore.parallel.layout import create_student_groups, student_layout
from kdrl_mcore.parallel.packing import PackedBatch
from kdrl_mcore.parallel.platform import device, to_device
from kdrl_mcore.student.optimizer import Optimizer
from kdrl_mcore.teacher.head import KnownTopKHead, TeacherHead
from kdrl_mcore.vocab_parallel import OUTSIDE, HeadTokens, Support, fused_head

Measures = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Scalars measured on some tokens: those that are summed over tokens, and those of which the maximum is taken."""

TokenLoss = Callable[[HeadTokens, bool, slice], tuple[Tensor, Measures]]
"""(tokens of a chunk, whether they have divergences from the teacher, their slice of the micro-batch's loss rows) -> (loss of
each token, measures)."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass needs.

    Attributes:
        sampler_log_probs_T: log mu of the loss rows; None if the student's present weights sampled them.
        teacher_hidden_DG: the teacher's hidden states of the first D loss rows (or what its servers know of them,
            `teacher.head.pack_top_k`), in host memory; None unless the loss compares student and teacher over the vocabulary.
        given_T: which loss rows belong to given responses (bool); None without any. Measures of the student's own responses
            leave them out.
    """

    packed: PackedBatch
    token_loss: TokenLoss
    sampler_log_probs_T: Tensor | None = None
    teacher_hidden_DG: Tensor | None = None
    given_T: Tensor | None = None


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer update.

    Attributes:
        sums, maxima: the measures over all tokens of the global batch.
        grad_norm: global norm of the gradient before clipping.
        lr: the learning rate of this update.
        head_seconds: the time spent in the output head, on the rank that spent most.
        skipped: why the weights were not updated (something was NaN or infinite), or None.
        gradient_split: the norms of the GRPO and distillation gradients and the cosine between them; empty unless measured.
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    grad_norm: float
    lr: float
    skipped: str | None
    head_seconds: float = 0.0
    gradient_split: dict[str, float] = field(default_factory=dict)


class Student:
    """The learning model of one rank.

    Attributes:
        lora: the settings of the adapters, if adapters are trained and the other weights frozen; otherwise None.
        support: what the rollouts' settings leave of its distribution; None if that is all of it.
    """

    def __init__(
        self, config: Config, world_size: int, vocab_size: int, on_parameter: Callable[[], None] = lambda: None
    ) -> None:
        """Build and load this rank's shard. Collective over the world.

        Args:
            vocab_size: the number of tokens of the tokenizer; further columns are masked out of the softmax.
            on_parameter: called before each parameter is read.
        """
        parallel = config.parallel
        layout = student_layout(world_size, parallel)
        assert config.student.path is not None
        self.groups = create_student_groups(layout)
        self.lora = config.student.lora if config.student.lora.rank else None
        if self.lora is not None:
            check_student_base(config.student.path)
        self.parts: ModelParts = build_model(
            read_architecture(config.student.path),
            config.model,
            self.groups,
            vocab_size=vocab_size,
            activations=Activations.of(parallel),
            share_prompts=config.batch.share_prompts,
            lora=self.lora,
            replay_experts=config.rollout.replay_experts,
            trainable=True,
        )
        load_weights(self.parts, config.student.path, on_parameter)
        if self.lora is not None and self.lora.path is not None:
            load_adapters(self.parts, self.lora.path, self.lora)
        elif self.lora is not None:
            initialise_adapters(self.parts.chunks, self.groups.tensor, config.trainer.seed)
        self._path = config.student.path
        self.source = str(config_folder(config.student.path))
        self.version = 0  # number of optimizer updates of the weights
        rollout = config.rollout
        self.support = Support(rollout.top_p, rollout.top_k, rollout.min_p) if truncates(config) else None
        self._temperature = 1.0 if is_supervised(config.objective) else config.rollout.temperature
        self._dtype = config.model.dtype
        self.is_float32 = DTYPES[self._dtype] == torch.float32
        self.teacher_head: TeacherHead | KnownTopKHead | None = None
        self._kd = config.objective.kd
        self._shares_teacher_head = shares_teacher_head(config)
        self._head_time = Stopwatch()
        self.optimizer = Optimizer(self.parts, config)

    def load_teacher_head(self, paths: Sequence[str], kd: DistillationConfig) -> None:
        """Read this rank's columns of the teacher's head, or of the heads of several teachers, with which the loss compares
        student and teacher over the vocabulary. Does nothing except on the last stage. No communication.

        Args:
            paths: the teachers' directories.

        Raises:
            ConfigError: see `TeacherHead`.
        """
        if self.groups.is_last_stage:
            self.teacher_head = TeacherHead.read(paths, self.parts.chunks[-1].shard, self._dtype, kd)

    def expect_known_top_k(self) -> None:
        """Compare student and teacher on the teacher's most likely tokens, which its servers report. Does nothing except on the
        last stage. No communication.

        Raises:
            ConfigError: see `KnownTopKHead`.
        """
        if self.groups.is_last_stage:
            self.teacher_head = KnownTopKHead(self.parts.chunks[-1].shard, self._kd)

    def add_teacher_adapters(self, folder: str) -> None:
        """Add a second set of adapters to the frozen weights, which is off until a teacher scores with it. No communication.

        Args:
            folder: a PEFT folder.

        Raises:
            ConfigError, ModelError: its adapters belong to another model, or cannot be used.
        """
        check_teacher_adapters(folder, self._path)
        lora, _ = read_peft_folder(folder)
        for chunk in self.parts.chunks:
            add_teacher_adapters(chunk, lora, self.groups)
        load_adapters(self.parts, folder, lora, TEACHER_ADAPTER)

    @torch.no_grad()
    def use_own_head_as_teachers(self) -> None:
        """Use this rank's columns of the student's own head, with its weights of this moment, as the teacher's head. Does
        nothing except on the last stage. No communication.

        Raises:
            ConfigError: see `TeacherHead`.
        """
        if not self.groups.is_last_stage:
            return
        chunk = self.parts.chunks[-1]
        weight_VH = chunk.head_weight().detach()[: chunk.shard.real_columns]
        if self.teacher_head is None:
            self.teacher_head = TeacherHead(
                weight_VH if self._shares_teacher_head else weight_VH.clone(), chunk.shard, self._kd
            )
        elif not self._shares_teacher_head:
            assert isinstance(self.teacher_head, TeacherHead)
            self.teacher_head.weight_VG.copy_(weight_VH)

    def update(self, micro_batches: Sequence[MicroBatch], lr: float) -> UpdateResult:
        """One optimizer step on the global batch. Collective over the world.

        Each token's loss already contains the global normaliser, so gradients are summed over micro-batches and data-parallel
        ranks and never divided. If the loss, a measure or the gradient is NaN or infinite on any rank, no rank updates its
        weights.

        Args:
            micro_batches: this data-parallel rank's micro-batches, the same number on every rank.
        """
        measures, grad_norm = self._gradient(micro_batches)
        sums, maxima = _add_up(measures)
        sums, maxima = sum_over_replicas(self.groups, sums, {**maxima, "head_seconds": self._head_time.take()})
        head_seconds = maxima.pop("head_seconds")
        if self.parts.replay is not None:
            maxima["router_flip_share"] = self.parts.replay.take_changed_share()
        skipped = None
        bad = [name for name, value in {**sums, **maxima}.items() if not math.isfinite(value)]
        if any_rank(bool(bad) or not math.isfinite(grad_norm) or not self.optimizer.gradient_is_finite()):
            skipped = f"{bad[0]} is not finite" if bad else "the gradient is not finite"
        else:
            self.optimizer.step(lr, grad_norm)
            self.version += 1
            self.optimizer.follow(self.version)
        self.optimizer.gather_weights()
        self.optimizer.leave_device()
        return UpdateResult(sums, maxima, grad_norm, lr, skipped, head_seconds)

    def weights_are_finite(self) -> bool:
        """Whether the weights that this rank's optimizer updated or loaded are finite. Not collective: each weight is checked
        by the rank that holds it."""
        return self.optimizer.weights_are_finite()

    def gradient_norm(self, micro_batches: Sequence[MicroBatch]) -> float:
        """The global norm of the gradient on the global batch, without an update. Collective over the world."""
        norm = self._gradient(micro_batches)[1]
        self.optimizer.gather_weights()
        return norm

    def wait_for_weights(self) -> None:
        """Under `parallel.overlap_param_gather`, wait for the weights that other ranks updated. Forward passes wait by
        themselves; any other reader of weights must call this first."""
        self.optimizer.wait_for_weights()

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Weights (adapters alone, where those are trained) and optimizer state as Megatron's sharded tensors, to save a
        checkpoint or to load one into (for loading, only the optimizer's tensors, under `OPTIMIZER_TENSORS`). They are views of
        this rank's state; nothing is copied. An off-loaded optimizer state is moved to the device, where it stays until
        `leave_state`."""
        self.wait_for_weights()
        weights = {name: self._sharded_weights(chunk, loading=loading) for name, chunk in self._named_chunks().items()}
        return {**weights, **self.optimizer.sharded_state(weights, loading=loading)}

    def leave_state(self) -> None:
        """Move an off-loaded optimizer state off the device, whose memory sampling needs. Called once the tensors of
        `sharded_state` have been copied or loaded."""
        self.optimizer.leave_device()

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Load what `dist_checkpointing.load` returned for `sharded_state(loading=True)`. The optimizer's tensors were already
        loaded in place; of its scalars only the step count is used, all others are this run's."""
        take = mcore.take_weights if self.lora is None else load_factors
        for name, chunk in self._named_chunks().items():
            take(chunk, state[name])
        self.optimizer.load_sharded_state(state)

    def continue_from(self, version: int) -> None:
        """Count further updates from the `version` of the loaded weights. No communication."""
        self.version = version

    def _sharded_weights(self, chunk: LanguageModel, *, loading: bool) -> dict[str, Any]:
        """The part of a chunk that is saved: its weights, or only the adapters if the weights are frozen."""
        if self.lora is not None:
            return sharded_factors(chunk, self.groups)
        return mcore.weights_to_load(chunk) if loading else chunk.sharded_state_dict()

    def _named_chunks(self) -> dict[str, LanguageModel]:
        """The chunks by their names in a checkpoint."""
        chunks = self.parts.chunks
        return {"model" if len(chunks) == 1 else f"model{index}": chunk for index, chunk in enumerate(chunks)}

    def _gradient(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Measures], float]:
        """Compute the main gradients of the global batch; returns (this rank's measures, global norm)."""
        self.optimizer.zero_grad()
        measures = self._forward_backward(micro_batches)
        return measures, self.optimizer.prepare_gradient()

    def _forward_backward(self, micro_batches: Sequence[MicroBatch]) -> list[Measures]:
        """Run Megatron's schedule over the micro-batches; returns the measures of each, on the last stage."""
        layout = self.groups.layout
        with self.optimizer.reducing_gradients():
            measures = mcore.forward_backward_function(layout.pipeline, layout.virtual_pipeline)(
                forward_step_func=self._forward_step,
                data_iterator=[iter(micro_batches) for _ in self.parts.chunks],
                model=self.optimizer.ddp,
                num_microbatches=len(micro_batches),
                seq_length=1,  # only a hint: variable_seq_lengths sends each micro-batch's own shape
                micro_batch_size=1,
                p2p_communicator=P2PCommunicator(self.groups.pipeline, self.parts.config),
                pg_collection=self.groups.groups,
            )
        if self.parts.replay is not None:
            self.parts.replay.finish()
        for chunk in self.parts.chunks:
            chunk.set_input_tensor(None)  # the last hidden states that came through the pipeline
        return measures

    def _forward_step(self, iterator: Iterator[MicroBatch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
        micro = next(iterator)
        chunk, batch = model.module, micro.packed
        replay = self.parts.replay
        with nullcontext() if replay is None else replay.forward(chunk, batch.experts_SLK, counts=True):
            hidden = model(
                input_ids=batch.tokens_S[None],
                position_ids=batch.positions_S[None],
                attention_mask=None,
                packed_seq_params=chunk.pack_batch(batch),
            )
        return hidden, partial(self._loss, chunk, micro)

    def _loss(self, chunk: Any, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Measures]:
        measured: list[Measures] = []

        teacher = None
        if micro.teacher_hidden_DG is not None:
            assert self.teacher_head is not None
            teacher = self.teacher_head.inputs(to_device(micro.teacher_hidden_DG), micro.sampler_log_probs_T)

        def token_loss(tokens: HeadTokens, rows: slice) -> Tensor:
            loss_C, measures = micro.token_loss(tokens, teacher is not None, rows)
            measured.append(measures)
            return loss_C

        hidden_SH, weight_VH, adapter_VR = chunk.head_inputs(hidden.squeeze(1))
        with self._head_time(), named_range("head"):
            outputs = fused_head(
                hidden_SH,
                weight_VH,
                micro.packed.rows_T,
                micro.packed.targets_T,
                token_loss,
                chunk.shard,
                temperature=self._temperature,
                adapter_VR=adapter_VR,
                teacher=teacher,
                sequence_parallel=self.parts.config.sequence_parallel,
                support=self.support,
            )
        if teacher is not None:
            scored = slice(0, micro.packed.num_scored)
            d_D = outputs.teacher_log_probs[scored] - outputs.log_probs[scored]
            if self.support is not None:
                d_D = torch.where(outputs.log_probs[scored] < OUTSIDE, 0.0, d_D)
            d_D = d_D if micro.given_T is None else torch.where(micro.given_T[scored], 0.0, d_D)
            measured.append((measured_divergences(d_D, outputs.divergences[scored]), {}))
        entropies_T = outputs.entropies if micro.given_T is None else torch.where(micro.given_T, 0.0, outputs.entropies)
        measured.append(({"loss": outputs.loss.detach(), "entropy": entropies_T.sum()}, {}))
        sums, maxima = _merge(measured)
        return outputs.loss, torch.zeros((), dtype=torch.int), (sums, maxima)


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
    """The merged measures as Python numbers; the host waits for the device only once."""
    sums, maxima = _merge(measured)
    values = [*sums.values(), *maxima.values()]
    if not values:
        return {}, {}
    numbers = torch.stack([value.to(device(), torch.float64) for value in values]).tolist()
    return dict(zip(sums, numbers, strict=False)), dict(zip(maxima, numbers[len(sums) :], strict=True))

"""The parts of a run, built once from the configuration and bound together: what `iteration.py` calls by the paper's names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdrl_mcore.config import Config, ObjectiveConfig, TeacherConfig, TeacherParallelConfig, can_be_positive
from kdrl_mcore.data.prompts import load_prompts
from kdrl_mcore.data.stream import PromptStream
from kdrl_mcore.data.vocabulary import shared_vocabulary
from kdrl_mcore.errors import CheckpointError, ConfigError, KdrlError
from kdrl_mcore.evaluation.evaluate import Evaluation
from kdrl_mcore.experience import BatchLoss, Experience, micro_batches
from kdrl_mcore.model.flop import peak_tflops, training_flop
from kdrl_mcore.model.scoring import score_rollouts
from kdrl_mcore.objective.joint import TokenBatch, gradient_split, joint_loss, sft_loss
from kdrl_mcore.objective.schedules import Coefficient, learning_rate
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.planning.memory import GIB, plan_engine_share
from kdrl_mcore.reward.golds import check_golds
from kdrl_mcore.reward.verifier import Verifier, verify_together
from kdrl_mcore.rollout.ahead import NextBatch, refuse_stale
from kdrl_mcore.rollout.engine import OnPart, RolloutEngine, Sampling
from kdrl_mcore.rollout.megatron import MegatronEngine
from kdrl_mcore.rollout.replay import ReplayEngine
from kdrl_mcore.rollout.vllm import VllmEngine
from kdrl_mcore.rollout.vllm_placement import start_replicas
from kdrl_mcore.student import Measures, Student, UpdateResult
from kdrl_mcore.teacher import Teacher, TeacherScores
from kdrl_mcore.teacher_head import OVER_THE_VOCABULARY, TeacherHead
from kdrl_mcore.types import Rollout, TokenFloats

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """Everything one rank needs to train. Methods are collective over the world unless they say otherwise."""

    config: Config
    student: Student
    teacher: Teacher | None
    reference: Teacher | None
    engine: RolloutEngine | None
    replay: ReplayEngine | None
    verifier: Verifier | None
    prompts: PromptStream | None
    evaluation: Evaluation | None
    alpha: Coefficient
    beta: Coefficient
    next_batch: NextBatch | None = None

    def refit(self) -> None:
        """Give the engine the student's present weights; nothing to do where the student samples for itself or rollouts are
        replayed. One step ahead, what the engine samples meanwhile is waited for."""
        if self.next_batch is not None:
            self.next_batch.finish()
        if self.replay is None and self.engine is not None:
            self.engine.refit(self.student)

    def sample(self, step: int, on_part: OnPart | None = None) -> list[Rollout]:
        """The step's rollouts, the same list on every rank: sampled from the next prompts, or replayed from a file. Under
        `teacher.score_while_sampling`, `on_part` is called meanwhile with the groups that are complete.

        One step ahead, they were sampled during the step before, and those of the step after it are begun now.
        """
        if self.replay is not None:
            return self.replay.rollouts()
        assert self.engine is not None and self.prompts is not None
        config, ahead = self.config, self.next_batch
        rollouts = None if ahead is None else ahead.take()
        if rollouts is None:
            rollouts = self.engine.generate(self.prompts.next_batch(), self._sampling(step), on_part)
        if ahead is not None and step < config.trainer.steps:
            ahead.begin(self.prompts.next_batch(), self._sampling(step + 1))
        self.engine.sleep()
        refuse_stale(rollouts, self.student.version, config.rollout.steps_ahead * config.batch.updates_per_step)
        return rollouts

    def _sampling(self, step: int) -> Sampling:
        settings = self.config.rollout
        return Sampling(
            settings.temperature,
            settings.top_p,
            settings.max_response_tokens,
            settings.responses_per_prompt,
            (self.config.trainer.seed, 0, step),
            verify=True,
            part_tokens=self._part_tokens(),
        )

    def _part_tokens(self) -> int:
        """Of a part that the teacher scores while others are sampled: a full micro-batch for every stage of every replica."""
        if self.teacher is None or not self.config.teacher.score_while_sampling:
            return 0
        layout = self.teacher.parts.groups.layout
        return self.config.batch.micro_tokens * layout.context * layout.pipeline * layout.data

    def sampling_state(self) -> dict[str, Any]:
        """Where sampling stands, for a checkpoint: the cursor of the prompts, and the complete batch of the coming step. One
        that is still being sampled is as if it had not been begun."""
        prompts = None if self.prompts is None else self.prompts.state_dict()
        if prompts is not None and self.next_batch is not None and self.next_batch.is_running:
            prompts["given"] -= self.config.rollout.prompts_per_step
        return {"prompts": prompts, "pending": None if self.next_batch is None else self.next_batch.state_dict()}

    def load_sampling_state(self, state: dict[str, Any]) -> None:
        """Go on where `sampling_state` stood.

        Raises:
            CheckpointError: there is a pending batch, and this run does not sample ahead.
        """
        if self.prompts is not None and state["prompts"] is not None:
            self.prompts.load_state_dict(state["prompts"])
        if self.next_batch is not None:
            self.next_batch.load_state_dict(state.get("pending"))
        elif state.get("pending"):
            raise CheckpointError("the checkpoint holds responses that were sampled ahead: resume with rollout.steps_ahead=1")

    def verify(self, rollouts: Sequence[Rollout]) -> None:
        """Set each rollout's reward and correctness. Each replica's leader verifies its share; replayed rollouts have
        theirs."""
        if self.replay is None:
            assert self.engine is not None
            if not self.engine.verifies:
                verify_together(self.student.groups, self.verifier, rollouts)

    def close(self) -> None:
        """End every process that the job has started. Not collective."""
        for part in (self.engine, self.verifier, self.evaluation):
            if part is not None:
                part.close()

    def score_with_teacher(self, scores: TeacherScores, rollouts: Mapping[int, Rollout], distil_N: Tensor) -> None:
        """Let the teacher score the responses to distil, once; it sees no others. Log-probs are put into the rollouts too,
        for the step's file.

        Args:
            scores: of this batch; is added to.
            rollouts: some of the batch or all, by their places in it. distil_N: which of these are distilled.
        """
        wanted = {
            place: rollout
            for (place, rollout), distil in zip(rollouts.items(), distil_N.tolist(), strict=True)
            if distil and place not in scores
        }
        if wanted:
            assert self.teacher is not None
            if self.config.objective.kd.estimator in OVER_THE_VOCABULARY:
                hidden = self.teacher.hidden_states(wanted, micro_tokens=self.config.batch.micro_tokens)
                scores.hidden = hidden.joined(scores.hidden)
            else:
                scores.log_probs.update(zip(wanted, self._score(self.teacher, list(wanted.values())), strict=True))
            scores.tokens += sum(len(rollout.response_token_ids) for rollout in wanted.values())
        for place, rollout in rollouts.items():
            rollout.teacher_log_probs = scores.log_probs.get(place)

    def split(self, rollouts: Sequence[Rollout], teacher: TeacherScores, distil_N: Tensor) -> list[Experience]:
        """The batches of the step's optimizer updates. More than one makes later ones off-policy: then pi_old is scored
        once, now."""
        updates = self.config.batch.updates_per_step
        old = None
        if updates > 1:
            scored = score_rollouts(
                self.student.parts,
                rollouts,
                temperature=self.config.rollout.temperature,
                micro_tokens=self.config.batch.micro_tokens,
            )
            old = [log_probs for log_probs, _ in scored]
        reference = None if self.reference is None else self._score(self.reference, rollouts)
        # With top_p the sampler's distribution is not the student's, but its nucleus.
        sampled_now = self.replay is None and self.config.rollout.steps_ahead == 0
        on_policy = updates == 1 and sampled_now and self.config.rollout.top_p == 1
        teacher_log_probs = [teacher.log_probs.get(place) for place in range(len(rollouts))] if teacher.log_probs else None
        experience = Experience(rollouts, distil_N, on_policy, teacher_log_probs, teacher.hidden, old, reference)
        return experience.split_by_group(updates)

    def update(self, experience: Experience, alpha: float, beta: float) -> UpdateResult:
        """One optimizer step on alpha * L_GRPO + beta * L_KD."""
        bad = experience.bad_log_probs()
        if bad is not None:
            return UpdateResult({}, {}, float("nan"), self._learning_rate(), bad)
        split = self._split_gradient(experience, alpha, beta)
        result = self._optimize(experience, self._loss(alpha, beta))
        return replace(result, gradient_split=gradient_split(*split, result.grad_norm)) if split else result

    def _loss(self, alpha: float, beta: float) -> BatchLoss:
        return partial(_joint, objective=self.config.objective, alpha=alpha, beta=beta)

    def _split_gradient(self, experience: Experience, alpha: float, beta: float) -> tuple[float, float] | None:
        """The norms of the GRPO and of the distillation gradient, where they are due and there is no third one."""
        every = self.config.logging.gradient_split_every
        if every == 0 or self.student.version % every or not (alpha > 0 and beta > 0) or self.reference is not None:
            return None
        settings = (self.student.groups, self.config.batch.micro_tokens)
        policy, distillation = (
            self.student.gradient_norm(micro_batches(experience, self._loss(*coefficients), *settings))
            for coefficients in ((alpha, 0.0), (0.0, beta))
        )
        return policy, distillation

    def update_supervised(self, experience: Experience) -> UpdateResult:
        """One optimizer step on -log pi(target)."""
        return self._optimize(experience, _supervised)

    def utilization(self, rollouts: Sequence[Rollout], seconds: float) -> dict[str, float]:
        """TFLOP/s of each rank in the step's updates, and their share of the GPU's peak where that is known. Not collective.

        Args:
            seconds: that the updates took.
        """
        sequences = [(rollout.num_tokens, len(rollout.response_token_ids)) for rollout in rollouts]
        flop = training_flop(self.student.parts.architecture, sequences)
        tflops = flop / seconds / dist.get_world_size() / 1e12
        peak = peak_tflops(self.config.cluster)
        return {"time/tflops": tflops, "time/mfu": tflops / peak} if peak else {"time/tflops": tflops}

    def advance_schedules(self, update: UpdateResult) -> None:
        """Move alpha and beta by one optimizer step; a skipped update does not count."""
        if update.skipped is None:
            tokens = update.sums.get("distilled_tokens", 0.0)
            kl = update.sums["kl_k1"] / tokens if tokens else None
            self.alpha.advance(kl)
            self.beta.advance(kl)

    def _score(self, model: Teacher, rollouts: Sequence[Rollout]) -> list[TokenFloats]:
        return model.score(rollouts, temperature=self.config.rollout.temperature, micro_tokens=self.config.batch.micro_tokens)

    def _optimize(self, experience: Experience, loss: BatchLoss) -> UpdateResult:
        config = self.config
        batches = micro_batches(experience, loss, self.student.groups, config.batch.micro_tokens)
        return self.student.update(batches, self._learning_rate())

    def _learning_rate(self) -> float:
        """Of the coming optimizer step."""
        total = self.config.trainer.steps * self.config.batch.updates_per_step
        return learning_rate(self.student.version, total, self.config.optimizer)


def _joint(
    log_probs_T: Tensor,
    divergence_T: Tensor | None,
    batch: TokenBatch,
    *,
    objective: ObjectiveConfig,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Measures]:
    loss_T, sums, maxima = joint_loss(log_probs_T, batch, objective, alpha, beta, divergence_T)
    return loss_T, (sums, maxima)


def _supervised(log_probs_T: Tensor, _: Tensor | None, batch: TokenBatch) -> tuple[Tensor, Measures]:
    tokens = log_probs_T.new_full((), len(log_probs_T))
    return sft_loss(log_probs_T, batch.policy_weights), ({"tokens": tokens}, {})


def _engine_share(config: Config) -> float | None:
    """Of a GPU, for a colocated engine: what the plan (docs/planning.md) leaves when the optimizer has its state, which it has
    not yet. Rank 0 plans. Collective over the world.

    Raises:
        ConfigError: on all ranks: it leaves too little.
    """
    if config.rollout.vllm.placement != "colocated" or not torch.cuda.is_available():
        return None
    totals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(totals, torch.cuda.get_device_properties(device()).total_memory)
    planned: list[float | KdrlError] = [0.0]
    if dist.get_rank() == 0:
        try:
            share = plan_engine_share(config, dist.get_world_size(), min(totals) / GIB)
            logger.info("colocated engines take %.0f %% of each GPU", 100 * share)
            planned = [share]
        except KdrlError as error:
            planned = [error]
    dist.broadcast_object_list(planned, src=0)
    if isinstance(planned[0], KdrlError):
        raise planned[0]
    return planned[0]


def build_job(config: Config, on_phase: Callable[[str], None] = lambda phase: None) -> Job:
    """Build every part of the run. Collective over the world.

    Args:
        on_phase: called with what is being done when it begins, and whenever it gets further.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained, naming what to change.
    """
    if not config.student.path:
        raise ConfigError("student.path is not set: name an HF model directory")
    world = dist.get_world_size()
    on_phase("load tokenizers")
    tokenizer, vocabulary = shared_vocabulary(config.student.path, config.teacher.path)
    if tokenizer is None and config.rollout.engine != "replay":
        raise ConfigError(f"{config.student.path} has no tokenizer.json, which sampling needs")
    sft = config.objective.kind == "sft"
    replays = config.rollout.engine == "replay"
    train = None
    if not replays or sft:
        if not config.data.train:
            raise ConfigError("data.train is not set: name a JSONL or parquet file, or a hub id")
        assert tokenizer is not None
        on_phase("load prompts")
        train = load_prompts(config.data.train, config.data, tokenizer, config.rollout.max_prompt_tokens, with_targets=sft)
        if not sft:
            check_golds(train, config.data.train, config.reward.kind)
    evaluates = config.eval.every >= 0 and bool(config.data.eval or config.eval.benchmarks)
    if evaluates and tokenizer is None:
        raise ConfigError(f"{config.student.path} has no tokenizer, which data.eval and eval.benchmarks need")
    student = Student(config, world, vocabulary, partial(on_phase, "load student"))
    on_phase("load evaluation")
    evaluation = Evaluation(config, tokenizer, student.groups) if evaluates and tokenizer is not None else None
    teacher = reference = None
    if not sft and can_be_positive(config.objective.beta):
        assert config.teacher.path is not None
        teacher = Teacher(
            config.teacher.path, config.teacher, config.model, world, vocabulary, partial(on_phase, "load teacher")
        )
        if config.objective.kd.clamp is not None and dist.get_rank() == 0:
            logger.warning("objective.kd.clamp=%g: tokens whose log-ratio is larger learn nothing", config.objective.kd.clamp)
        if config.objective.kd.estimator in OVER_THE_VOCABULARY and student.groups.is_last_stage:
            shard = student.parts.chunks[-1].shard
            student.teacher_head = TeacherHead(config.teacher.path, shard, config.model.dtype, config.objective.kd)
    if not sft and config.objective.reference_kl.coefficient > 0:
        layout = TeacherParallelConfig(config.parallel.tensor, config.parallel.pipeline, config.parallel.expert)
        reference = Teacher(
            config.student.path,
            TeacherConfig(parallel=layout),
            config.model,
            world,
            vocabulary,
            partial(on_phase, "load reference"),
        )
    on_phase("start engines")
    samples = train is not None and not sft
    in_vllm = config.rollout.engine == "vllm"
    # vLLM's responses arrive on rank 0, which verifies them while others are still being sampled.
    verifies = dist.get_rank() == 0 if in_vllm else student.groups.is_replica_leader
    verifier = Verifier(config.reward) if verifies and samples else None
    engine: RolloutEngine | None = None
    if tokenizer is not None and not in_vllm:
        engine = MegatronEngine(student.parts, tokenizer, config.rollout.max_sequences, lambda: student.version)
    elif tokenizer is not None and (samples or evaluation is not None):
        replicas = start_replicas(config, vocabulary, _engine_share(config), partial(on_phase, "start engines"))
        engine = VllmEngine(replicas, config.rollout, tokenizer, verifier)
    return Job(
        config=config,
        student=student,
        teacher=teacher,
        reference=reference,
        engine=engine,
        replay=ReplayEngine(config.rollout.path, vocabulary) if replays and not sft and config.rollout.path else None,
        verifier=verifier,
        prompts=PromptStream(train, config.rollout.prompts_per_step, config.trainer.seed, config.data.shuffle)
        if train
        else None,
        evaluation=evaluation,
        alpha=Coefficient(config.objective.alpha),
        beta=Coefficient(config.objective.beta),
        next_batch=NextBatch(engine) if isinstance(engine, VllmEngine) and config.rollout.steps_ahead else None,
    )

"""The plan of a run: the memory of every rank, the time of an iteration by phase, and the cost of the run."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_mcore.config.derived import (
    is_supervised,
    keeps_earlier_weights,
    needs_scores,
    samples,
    teaches_itself,
    uses_distributed_optimizer,
)
from kdrl_mcore.planning.memory import (
    RankMemory,
    checkpoint_bytes,
    earlier_bytes,
    largest_stage_bytes,
    offloaded_bytes,
    plan_memory,
    plan_server_memory,
    teacher_host_bytes,
)
from kdrl_mcore.planning.overlap import hidden_seconds
from kdrl_mcore.planning.passes import generation, layer_backward, layer_forward, pipeline_pass
from kdrl_mcore.planning.rates import CPU, HOST, MEMORY, NETWORK, Rates, Seconds
from kdrl_mcore.planning.setup import Setup
from kdrl_mcore.planning.workload import Workload

VERIFY = 0.02
"""Seconds that one worker needs for one answer (math-verify)."""


@dataclass(frozen=True)
class Phase:
    """One phase of an iteration."""

    name: str
    seconds: Seconds


@dataclass(frozen=True)
class Plan:
    """The estimates for a run before it is queued.

    Attributes:
        memory: of each pipeline stage, and of the servers' GPUs.
        phases: those of one iteration.
        hidden: the seconds by which overlapping with the servers' sampling shortens an iteration.
    """

    setup: Setup
    memory: tuple[RankMemory, ...]
    phases: tuple[Phase, ...]
    hidden: float

    @property
    def seconds(self) -> float:
        """The seconds of one iteration."""
        return sum(phase.seconds.total for phase in self.phases) - self.hidden

    @property
    def fits(self) -> bool:
        """Whether every rank's peak fits."""
        return all(rank.fits for rank in self.memory)

    @property
    def peak(self) -> float:
        """The bytes of the fullest rank in its fullest phase."""
        return max(rank.peak for rank in self.memory)

    @property
    def checkpoint_host_bytes(self) -> float:
        """The host memory, on a node with only ranks of the fullest stage, for the copy that is written during training; 0 if
        nothing is saved. Nothing is gathered for it (parallel/optimizer_state.py)."""
        saves = self.setup.config.checkpoint.every >= 0
        return checkpoint_bytes(self.setup) * _ranks_of_a_node(self.setup) if saves else 0.0

    @property
    def activation_host_bytes(self) -> float:
        """The host memory, on a node with only ranks of the fullest stage, for off-loaded activations."""
        return offloaded_bytes(self.setup) * _ranks_of_a_node(self.setup)

    @property
    def teacher_host_bytes(self) -> float:
        """The host memory, on a node, for the weights of off-loaded teachers."""
        return teacher_host_bytes(self.setup) * _ranks_of_a_node(self.setup)

    @property
    def tokens_per_gpu_second(self) -> float:
        """The prompt and response tokens of one iteration, per GPU and second."""
        return self.setup.trained.tokens / self.seconds / self.setup.gpus

    @property
    def gpu_hours(self) -> float:
        """The GPU-hours of the whole run, without evaluations."""
        return self.setup.config.trainer.steps * self.seconds * self.setup.gpus / 3600

    @property
    def cost(self) -> float:
        """The cost of the whole run in USD."""
        return self.gpu_hours * self.setup.cluster.usd_per_gpu_hour

    def phase(self, name: str) -> Seconds:
        """The seconds of a phase; none if the run has no such phase."""
        return next((phase.seconds for phase in self.phases if phase.name == name), Seconds())


def make_plan(setup: Setup) -> Plan:
    """Plan the memory and the time of a run.

    Raises:
        ConfigError: the configuration does not describe the cluster.
    """
    sft = is_supervised(setup.config.objective)
    phases = []
    sampled = generation(setup) if samples(setup.config) else None
    if sampled is not None:
        times = setup.samplings
        phases += [
            Phase("rollout", sampled.seconds * times),
            Phase("refit", _refit(setup)),
            Phase("reward", _reward(setup) * times),
        ]
    if setup.teacher is not None:
        phases.append(Phase("teacher", _teacher(setup)))
    if not sft and setup.updates > 1:
        phases.append(Phase("old policy", _score_with_student(setup)))
    if needs_scores(setup.config):  # each update scores its own share of the responses
        phases.append(Phase("scores", _score_with_student(setup)))
    if setup.reference:
        phases.append(Phase("reference", _score_with_student(setup) + _move_reference(setup)))
    phases.append(Phase("training", _training(setup)))
    if setup.config.checkpoint.every > 0:
        phases.append(Phase("checkpoint", _checkpoint(setup)))
    hidden = 0.0
    if sampled is not None:
        rest = sum(phase.seconds.total for phase in phases if phase.name not in ("rollout", "refit"))
        teacher = next((phase.seconds for phase in phases if phase.name == "teacher"), Seconds())
        hidden = hidden_seconds(setup, sampled, teacher, rest)
    return Plan(setup, (*plan_memory(setup), *plan_server_memory(setup)), tuple(phases), hidden)


def _loss_tokens(setup: Setup, packed_tokens: int, workload: Workload | None = None) -> float:
    """The number of response tokens among the tokens of the most loaded rank, which processes `workload` (None: what is
    trained on)."""
    workload = workload or setup.trained
    return packed_tokens * float(workload.lengths_N.sum()) / workload.rows(setup.sharing)


def _training(setup: Setup) -> Seconds:
    """The time of all updates of a step: passes, reduction of gradients, the optimizer, gathering of weights."""
    packed, student, rates = setup.update_packing, setup.student, Rates(setup.cluster)
    layout, settings = student.layout, setup.config.optimizer
    passes = pipeline_pass(setup, student, packed, _loss_tokens(setup, packed.tokens), train=True)
    stage = max(student.shard.stages, key=lambda stage: stage.trained)
    copies, stride = layout.data * layout.context, layout.tensor
    distributed = uses_distributed_optimizer(setup.config)
    reduce = rates.ring(4 * stage.trained, copies, stride) * (1 if distributed else 2)
    if setup.config.parallel.overlap_grad_reduce:
        # Only the last micro-batch's backward pass can hide it.
        backward = layer_backward(student, rates, setup.workload.attended(setup.sharing)) * stage.layers
        reduce = max(0.0, reduce - backward.total * packed.tokens / packed.micro_batches)
    gather = rates.ring(student.element * stage.trained, copies, stride) if distributed else 0.0
    if setup.config.parallel.overlap_param_gather:
        # Only the next update's first forward pass can hide it; what follows the last update of a step reads the weights.
        followed = 1.0 if is_supervised(setup.config.objective) else 1 - 1 / setup.updates
        forward = layer_forward(student, rates, setup.workload.attended(setup.sharing)) * stage.layers
        gather -= followed * min(gather, forward.total * packed.tokens / packed.micro_batches)
    held = stage.trained / (copies if distributed else 1)
    state = {"adam": 8, "sgd": 0}[settings.name] + (4 if student.element == 2 else 0)
    update = Seconds()
    update[NETWORK] = reduce + gather
    # The gradient is read for the norm, for clipping (and written), and for the update; the state is read and written.
    update[MEMORY] = rates.memory(held * (4 * 4 + 2 * state + student.element))
    if settings.offload:
        update[HOST] = rates.host(2 * held * state)
    return (passes + update) * setup.updates


def _teacher(setup: Setup) -> Seconds:
    """The time in which the weights of each teacher are loaded and score what the mask keeps, one teacher after the other; they
    need not be copied back, as the host memory keeps its copy. Earlier weights of the student's own are exchanged with the
    present ones, before and after."""
    seconds = Seconds()
    for name, teacher in setup.teachers.items():
        packed = setup.teacher_packings[name]
        loss_tokens = _loss_tokens(setup, packed.tokens, setup.read_by(name))
        seconds += pipeline_pass(setup, teacher, packed, loss_tokens, train=False)
        if not teaches_itself(setup.config) and setup.offloads(name):
            seconds[HOST] += Rates(setup.cluster).host(largest_stage_bytes(teacher))
    if teaches_itself(setup.config):
        return seconds + _exchange_weights(setup)
    return seconds


def _exchange_weights(setup: Setup) -> Seconds:
    seconds, rates, student = Seconds(), Rates(setup.cluster), setup.student
    if not keeps_earlier_weights(setup.config):
        return seconds
    share = earlier_bytes(setup)
    stage = max(student.shard.stages, key=lambda stage: stage.parameters)
    seconds[MEMORY] = rates.memory(4 * share)
    if setup.config.teacher.offload:
        seconds[HOST] = rates.host(4 * share)  # there and back, twice
    if uses_distributed_optimizer(setup.config):
        copies = student.layout.data * student.layout.context
        seconds[NETWORK] = 2 * rates.ring(student.element * stage.parameters, copies, student.layout.tensor)
    return seconds


def old_policy_seconds(setup: Setup) -> float:
    """The seconds of a pass that scores a step's responses with the student before its first update."""
    return _score_with_student(setup).total


def _score_with_student(setup: Setup) -> Seconds:
    packed = setup.scoring_packing
    return pipeline_pass(setup, setup.student, packed, _loss_tokens(setup, packed.tokens), train=False)


def _move_reference(setup: Setup) -> Seconds:
    seconds = Seconds()
    if setup.config.teacher.offload and not setup.student.shard.stages[0].adapters:
        largest = max(stage.parameters for stage in setup.student.shard.stages)
        seconds[HOST] = Rates(setup.cluster).host(largest * setup.student.element)
    return seconds


def _refit(setup: Setup) -> Seconds:
    """The time in which each engine rank receives its shard of the weights, from other nodes if there are several."""
    seconds = Seconds()
    if setup.engine is not None:
        received = setup.engine.shard.stages[0].parameters * setup.engine.element
        # Beyond one node, every GPU receives over its own adapter.
        stride = 1 if setup.gpus <= setup.cluster.gpus_per_node else setup.cluster.gpus_per_node
        seconds[NETWORK] = Rates(setup.cluster).link(received, setup.gpus, stride)
    return seconds


def _reward(setup: Setup) -> Seconds:
    """The time to verify the answers, which are divided among the replicas' leaders with `reward.workers` processes each."""
    seconds, layout = Seconds(), setup.student.layout
    seconds[CPU] = setup.workload.responses * VERIFY / (layout.data * layout.context * setup.config.reward.workers)
    return seconds


def _checkpoint(setup: Setup) -> Seconds:
    """The time per step for checkpoints: the copy to host memory, and the writing if training waits for it."""
    settings, seconds = setup.config.checkpoint, Seconds()
    seconds[HOST] = Rates(setup.cluster).host(checkpoint_bytes(setup)) / settings.every
    if not settings.asynchronous:
        written = checkpoint_bytes(setup) * _ranks_of_a_node(setup)
        seconds["storage"] = written / (setup.cluster.storage_gbs * 1e9) / settings.every
    return seconds


def _ranks_of_a_node(setup: Setup) -> int:
    return min(setup.cluster.gpus_per_node, setup.student.layout.world_size)

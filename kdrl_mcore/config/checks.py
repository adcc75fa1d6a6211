"""What a configuration must fulfil before anything is built."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from kdrl_mcore.config.schema import (
    CHOICES,
    REWARD_KINDS,
    Config,
    RewardConfig,
    ScheduleConfig,
    VllmConfig,
)
from kdrl_mcore.errors import ConfigError


def check_config(config: Config) -> None:
    """Refuse combinations that cannot work, before anything is built.

    Raises:
        ConfigError: naming the key and what to set instead.
    """
    flat = flatten(OmegaConf.to_container(OmegaConf.structured(config)))  # which checks the types inside lists as well
    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            raise ConfigError(f"{key}={flat[key]} is not one of: {', '.join(allowed)}")
    positive = (
        "parallel.tensor parallel.pipeline parallel.context parallel.expert teacher.parallel.tensor teacher.parallel.pipeline "
        "teacher.parallel.expert "
        "rollout.prompts_per_step rollout.responses_per_prompt rollout.max_response_tokens rollout.max_sequences "
        "rollout.temperature rollout.vllm.tensor rollout.vllm.kv_cache_gib rollout.vllm.startup_timeout "
        "rollout.vllm.generation_timeout rollout.vllm.refit_timeout rollout.vllm.refit_bucket_mib batch.micro_tokens "
        "batch.updates_per_step reward.workers reward.timeout eval.samples "
        "reward.remote.timeout reward.remote.attempts reward.remote.batch_size reward.local.batch_size"
    )
    for key in positive.split():
        if flat[key] <= 0:
            raise ConfigError(f"{key}={flat[key]} must be greater than 0")
    if not 0 <= config.trainer.hang_timeout < 60 * config.trainer.distributed_timeout_minutes:
        raise ConfigError(
            f"trainer.hang_timeout={config.trainer.hang_timeout:g} must be 0 (off) or shorter than "
            f"trainer.distributed_timeout_minutes={config.trainer.distributed_timeout_minutes}, which ends the job without "
            "telling who hangs"
        )
    for key, least in (("steps", 1), ("ranks", 0)):
        if any(number < least for number in getattr(config.trainer.profile, key)):
            raise ConfigError(f"trainer.profile.{key}={getattr(config.trainer.profile, key)}: each must be at least {least}")
    if not 0 < config.rollout.top_p <= 1:
        raise ConfigError(f"rollout.top_p={config.rollout.top_p} must be in (0, 1]")
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tensor > 1")
    if config.rollout.engine == "replay" and not config.rollout.path:
        raise ConfigError("rollout=replay needs rollout.path=FILE, a rollout file (JSONL)")
    if config.rollout.engine == "vllm":
        _check_vllm(config.rollout.vllm)
    _check_overlap(config)
    _check_reduction(config)
    _check_rewards(config.reward)
    _check_objective(config)


def _check_rewards(reward: RewardConfig) -> None:
    kinds = {"reward.kind": reward.kind} | {f"reward.terms[{i}].kind": term.kind for i, term in enumerate(reward.terms)}
    for key, kind in kinds.items():
        if kind not in REWARD_KINDS and ":" not in kind:
            raise ConfigError(f"{key}={kind} is not one of: {', '.join(REWARD_KINDS)}, or MODULE:NAME")
    if "remote_model" in kinds.values() and not reward.remote.url:
        raise ConfigError("the reward remote_model needs reward.remote.url, where responses are posted")
    if "local_model" in kinds.values() and not reward.local.path:
        raise ConfigError("the reward local_model needs reward.local.path, an HF sequence-classification directory")


def _check_vllm(settings: VllmConfig) -> None:
    if settings.gpu_memory_utilization is not None and not 0 < settings.gpu_memory_utilization <= 1:
        raise ConfigError(f"rollout.vllm.gpu_memory_utilization={settings.gpu_memory_utilization} must be in (0, 1]")
    for key, value in (("replicas", settings.replicas), ("restarts", settings.restarts)):
        if value < 0:
            raise ConfigError(f"rollout.vllm.{key}={value} must not be negative")
    if settings.servers and settings.placement != "server":
        raise ConfigError("rollout.vllm.servers needs rollout.vllm.placement=server")
    if settings.servers and settings.replicas not in (0, len(settings.servers)):
        raise ConfigError(
            f"rollout.vllm.replicas={settings.replicas} but rollout.vllm.servers names {len(settings.servers)}: leave one out"
        )
    for address in settings.servers:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"rollout.vllm.servers: '{address}' is not host:port")


def _check_overlap(config: Config) -> None:
    """What goes on while servers sample."""
    rollout = config.rollout
    if config.teacher.score_while_sampling and (
        rollout.engine != "vllm" or rollout.vllm.placement != "server" or rollout.steps_ahead
    ):
        raise ConfigError(
            "teacher.score_while_sampling=true needs an engine that samples this step's responses on devices of its own: set "
            "rollout=vllm, rollout.vllm.placement=server and rollout.steps_ahead=0"
        )
    if rollout.steps_ahead not in (0, 1):
        raise ConfigError(f"rollout.steps_ahead={rollout.steps_ahead} is not one of: 0, 1")
    if not rollout.steps_ahead:
        return
    if rollout.engine != "vllm" or rollout.vllm.placement != "server":
        raise ConfigError(
            "rollout.steps_ahead=1 needs an engine that does not share the training's devices: set rollout=vllm and "
            "rollout.vllm.placement=server"
        )
    if can_be_positive(config.objective.alpha) and config.objective.sampler_correction.kind == "none":
        raise ConfigError(
            "rollout.steps_ahead=1 trains on responses of older weights: set objective.sampler_correction.kind=truncate or mask"
        )


def _check_reduction(config: Config) -> None:
    """How gradients are reduced and updated weights gathered."""
    parallel = config.parallel
    if parallel.bucket_size is not None and parallel.bucket_size < 1:
        raise ConfigError(f"parallel.bucket_size={parallel.bucket_size} must be at least 1, or null")
    for key, cut in (
        ("parallel.bucket_size", parallel.bucket_size is not None),
        ("parallel.overlap_param_gather", parallel.overlap_param_gather),
    ):
        if cut and not parallel.overlap_grad_reduce:
            raise ConfigError(f"{key} needs buckets, which only parallel.overlap_grad_reduce=true makes")
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and config.optimizer.name == "adam"):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and optimizer.name=adam: otherwise "
            "every rank updates all its weights and gathers none"
        )


def _check_objective(config: Config) -> None:
    objective = config.objective
    if objective.kind == "sft":
        return
    learns_from_reward = can_be_positive(objective.alpha)
    if learns_from_reward and config.rollout.engine != "replay" and config.rollout.responses_per_prompt == 1:
        raise ConfigError(
            "rollout.responses_per_prompt=1 has no group to compare with: GRPO needs at least 2 "
            "(or set objective.alpha.init=0 for plain distillation)"
        )
    if can_be_positive(objective.beta) and not config.teacher.path:
        raise ConfigError("objective.beta is positive but teacher.path is not set: name the teacher, or use objective=grpo")
    if objective.kd.placement != "loss" and objective.kd.estimator not in ("k1", "k2"):
        raise ConfigError(
            f"objective.kd.placement={objective.kd.placement} uses the log-ratio itself; "
            f"objective.kd.estimator={objective.kd.estimator} only fits placement=loss"
        )


def can_be_positive(schedule: ScheduleConfig) -> bool:
    """Whether a coefficient schedule is above zero at some step."""
    values = {
        "constant": (schedule.init,),
        "switch": (schedule.init, schedule.after),
        "linear": (schedule.init, schedule.min, -schedule.delta),  # a negative delta lets it grow
    }
    return max(values.get(schedule.kind, (schedule.init, schedule.min))) > 0


def flatten(tree: Any) -> dict[str, Any]:
    """A nested configuration as `group.key: value`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in flatten(value).items()})
        else:
            flat[key] = value
    return flat

"""Checks of a configuration, made before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kdrl_mcore.config.axes import check_axes
from kdrl_mcore.config.derived import (
    LORA_RANKS,
    can_be_positive,
    compares_over_vocabulary,
    domain_name,
    engines_have_own_gpus,
    evaluates,
    is_supervised,
    learns_from_reward,
    replays,
    samples,
    teaches_itself,
    uses_given,
)
from kdrl_mcore.config.engine_arguments import extra_arguments
from kdrl_mcore.config.keys import CHOICES, RANGES, TAKE_FUNCTIONS, general_name, key_types, nearest
from kdrl_mcore.config.parallelism import check_activations, check_layout, check_reduction
from kdrl_mcore.config.ranges import check_number, numbers
from kdrl_mcore.config.schema import (
    LOGGERS,
    LORA_HEAD,
    LORA_MODULES,
    LORA_PARAMETERS,
    OWN_SCALES,
    REWARD_KINDS,
    Config,
    DataConfig,
    LoraConfig,
    OptimizerConfig,
    RewardConfig,
    ScheduleConfig,
    VllmConfig,
)
from kdrl_mcore.config.several_teachers import check_teachers
from kdrl_mcore.config.teacher_servers import check_teacher_servers
from kdrl_mcore.config.teachers import check_teacher
from kdrl_mcore.errors import ConfigError

MAY_BE_EMPTY = ("cluster.name",)
"""Keys whose text may be empty; for all others an empty text counts as a forgotten value."""


def check_config(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    tree = asdict(config)
    flat = flatten(tree)
    _check_items(flat)
    check_ranges(tree)
    for key, value in flat.items():
        if isinstance(value, str) and not value.strip() and key not in MAY_BE_EMPTY:
            raise ConfigError(f"{key} is empty: give it a value, or leave it out")
    for key, value in flat.items():
        general = general_name(key)
        allowed, own = CHOICES.get(general), ", or MODULE:NAME" if general in TAKE_FUNCTIONS else ""
        if allowed is not None and value not in allowed and not (own and ":" in str(value)):
            raise ConfigError(f"{key}={value} is not one of: {', '.join(allowed)}{own}{nearest(str(value), allowed)}")
    if not config.trainer.hang_timeout < 60 * config.trainer.distributed_timeout_minutes:
        raise ConfigError(
            f"trainer.hang_timeout={config.trainer.hang_timeout:g} must be 0 (off) or shorter than "
            f"trainer.distributed_timeout_minutes={config.trainer.distributed_timeout_minutes}, which ends the job without "
            "naming the rank that hangs"
        )
    _check_lora(config)
    check_layout(config.parallel)
    check_activations(config.parallel)
    if config.rollout.engine == "replay" and not config.rollout.path:
        raise ConfigError("rollout=replay needs rollout.path=FILE, a rollout file (JSONL)")
    if config.rollout.engine == "vllm":
        _check_vllm(config.rollout.vllm)
    _check_stops(config)
    _check_replay_of_experts(config)
    _check_optimizer(config.optimizer)
    _check_overlap(config)
    check_reduction(config)
    _check_rewards(config.reward, config.data)
    _check_sources(config.data)
    _check_loggers(config.logging.loggers)
    _check_schedule("objective.alpha", config.objective.alpha)
    _check_schedule("objective.beta", config.objective.beta)
    _check_plateaus(config)
    _check_objective(config)


def check_ranges(tree: Mapping[str, Any]) -> None:
    """Check that every number of a nested configuration is in the range of its key.

    Raises:
        ConfigError: the message names the first key out of range, and the range.
    """
    for name, value in numbers(tree):
        check_number(name, value, RANGES[general_name(re.sub(r"\[\d+\]", "[]", name))])


def _check_stops(config: Config) -> None:
    for name, stop in (("rollout.stop", config.rollout.stop), ("eval.stop", config.eval.stop)):
        if "" in (stop or ()):
            raise ConfigError(f"{name} has an empty text, which every response contains: leave it out")
    if config.rollout.stop and not samples(config) and (config.eval.stop is not None or not evaluates(config)):
        raise ConfigError("rollout.stop has no effect, because this run samples no responses: leave it out")


def _check_replay_of_experts(config: Config) -> None:
    if not config.rollout.replay_experts:
        return
    name = "rollout.replay_experts=true"
    if is_supervised(config.objective):
        raise ConfigError(f"{name} replays what a sampler chose, but sft samples nothing: set it to false")
    if uses_given(config):
        raise ConfigError(f"{name} replays what a sampler chose, which given responses lack: set rollout.given.share=0")


def _check_sources(data: DataConfig) -> None:
    if data.train and data.sources:
        raise ConfigError("data.train and data.sources are both set: name one data set, or several with their weights")
    names = [domain_name(source) for source in data.sources]
    for i, (name, source) in enumerate(zip(names, data.sources, strict=True)):
        if not source.path:
            raise ConfigError(f"data.sources[{i}].path is not set: name a JSONL or parquet file, or a hub id")
        if not name or "/" in name:
            raise ConfigError(f"data.sources[{i}].name={name!r} must be a word without a slash")
        if names.count(name) > 1:
            raise ConfigError(f"two of data.sources are called '{name}': give each its own `name`")


def _check_items(flat: dict[str, Any]) -> None:
    """Check the types of list items, which Hydra does not check for nested lists."""
    types_of = key_types()
    for name, value in flat.items():
        types = types_of.get(f"{general_name(name)}[]")
        for index, item in enumerate((value or ()) if types is not None else ()):
            if not isinstance(item, types or ()):
                raise ConfigError(f"{name}[{index}]: Cannot convert {item!r} to {(types or (str,))[0].__name__}")


def _check_lora(config: Config) -> None:
    """Check the adapters' settings; model/lora.py checks them against the model."""
    lora, vllm = config.student.lora, config.rollout.vllm
    if vllm.refit_adapters and (lora.rank == 0 or not engines_have_own_gpus(config.rollout)):
        raise ConfigError(
            "rollout.vllm.refit_adapters=true needs student.lora.rank > 0 and rollout.vllm.placement=server (colocated engines "
            "give up their base when they sleep): leave it at false, which sends merged weights"
        )
    if vllm.refit_adapters and (lora.target_parameters or LORA_HEAD in lora.target_modules):
        raise ConfigError(
            "rollout.vllm.refit_adapters=true is not for adapters of experts (student.lora.target_parameters) or of lm_head: "
            "leave it at false, which sends merged weights"
        )
    own = teaches_itself(config) and config.teacher.weights not in ("base", "adapters")
    if LORA_HEAD in lora.target_modules and own and compares_over_vocabulary(config.objective):
        raise ConfigError(
            f"teacher.weights={config.teacher.weights}, which the loss compares with the student over the vocabulary, needs an "
            "output head without an adapter: leave lm_head out of student.lora.target_modules"
        )
    if vllm.refit_adapters and lora.rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"vLLM takes adapters of rank {LORA_RANKS[-1]} at most, not student.lora.rank={lora.rank}: set "
            "rollout.vllm.refit_adapters=false, which sends merged weights"
        )
    if lora.rank == 0:
        defaults = LoraConfig()
        for name in ("alpha", "target_modules", "target_parameters", "path"):
            if getattr(lora, name) != getattr(defaults, name):
                raise ConfigError(f"student.lora.{name} is for adapters: set student.lora.rank > 0, or leave it out")
        return
    if not lora.target_modules and not lora.target_parameters:
        raise ConfigError("student.lora.target_modules is empty, so nothing would be trained: name some, or set rank to 0")
    for key, names, known in (
        ("target_modules", lora.target_modules, (*LORA_MODULES, LORA_HEAD)),
        ("target_parameters", lora.target_parameters, LORA_PARAMETERS),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(f"student.lora.{key}: {name} is not one of: {', '.join(known)}{nearest(name, known)}")
            if names.count(name) > 1:
                raise ConfigError(f"student.lora.{key} names {name} twice: leave one out")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    if optimizer.schedule != "constant" and optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"optimizer.min_lr={optimizer.min_lr:g}, where a {optimizer.schedule} schedule ends, is above "
            f"optimizer.lr={optimizer.lr:g}, where it begins: lower it"
        )


def _check_schedule(name: str, schedule: ScheduleConfig) -> None:
    """Check the settings that a coefficient's kind of schedule needs."""
    if schedule.kind in ("cosine", "switch") and schedule.steps == 0:
        raise ConfigError(f"{name}.kind={schedule.kind} needs {name}.steps > 0, the step at which it ends")
    if schedule.kind == "adaptive" and not (schedule.target > 0 and schedule.init > 0):
        raise ConfigError(f"{name}.kind=adaptive needs {name}.target > 0 (the KL per token to hold) and {name}.init > 0")
    if schedule.kind == "below" and (schedule.target > 0) == (schedule.drop > 0):
        raise ConfigError(
            f"{name}.kind=below needs either {name}.target > 0, the KL per token at which it switches, or {name}.drop > 0, by "
            "how much the KL must fall"
        )
    if schedule.kind == "adaptive" and not schedule.min <= schedule.init <= schedule.max:
        raise ConfigError(
            f"{name}.init={schedule.init:g} must lie between {name}.min={schedule.min:g} and {name}.max={schedule.max:g}, the "
            "bounds of an adaptive schedule"
        )


def _check_plateaus(config: Config) -> None:
    """Check the settings that depend on evaluations during training."""
    during_training = evaluates(config) and config.eval.every > 0
    for key, is_set in (
        ("trainer.stop_after", config.trainer.stop_after > 0),
        ("checkpoint.best", config.checkpoint.best is not None),
    ):
        if is_set and not during_training:
            raise ConfigError(f"{key} depends on evaluations during training: set eval.every, and data.eval or eval.benchmarks")
    if config.checkpoint.best is not None and config.checkpoint.every < 0:
        raise ConfigError("checkpoint.best keeps a checkpoint, but checkpoint.every=-1 writes none: leave one out")
    for name in ("alpha", "beta"):
        if getattr(config.objective, name).kind == "plateau" and not during_training:
            raise ConfigError(
                f"objective.{name}.kind=plateau watches eval/accuracy: set eval.every, and data.eval or eval.benchmarks"
            )


def _check_rewards(reward: RewardConfig, data: DataConfig) -> None:
    kinds = {"reward.kind": reward.kind} | {f"reward.terms[{i}].kind": term.kind for i, term in enumerate(reward.terms)}
    kinds |= {f"data.sources[{i}].reward": source.reward for i, source in enumerate(data.sources) if source.reward}
    for key, kind in kinds.items():
        if kind not in REWARD_KINDS and ":" not in kind:
            raise ConfigError(
                f"{key}={kind} is not one of: {', '.join(REWARD_KINDS)}, or MODULE:NAME{nearest(kind, REWARD_KINDS)}"
            )
    if reward.kind in REWARD_KINDS and reward.kind not in OWN_SCALES and not 0 < reward.threshold <= 1:
        raise ConfigError(
            f"reward.threshold={reward.threshold:g} must be greater than 0 and at most 1: scores of {reward.kind} lie between "
            "0 and 1"
        )
    if "remote_model" in kinds.values() and not reward.remote.url:
        raise ConfigError("the reward remote_model needs reward.remote.url, where responses are posted")
    if "local_model" in kinds.values() and not reward.local.path:
        raise ConfigError("the reward local_model needs reward.local.path, an HF sequence-classification directory")


def _check_loggers(names: Sequence[str]) -> None:
    for name in names:
        if name not in LOGGERS and ":" not in name:
            raise ConfigError(
                f"logging.loggers: {name} is not one of: {', '.join(LOGGERS)}, or MODULE:NAME{nearest(name, LOGGERS)}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"logging.loggers names {name} twice: leave one out")


def _check_vllm(settings: VllmConfig) -> None:
    extra_arguments(settings.extra, "rollout.vllm.extra")
    if settings.extra and settings.servers:
        raise ConfigError("rollout.vllm.extra is for engines that the run starts: give it to kdrl-serve as --extra")
    if settings.servers and settings.placement != "server":
        raise ConfigError("rollout.vllm.servers needs rollout.vllm.placement=server")
    if settings.servers and settings.replicas not in (0, len(settings.servers)):
        raise ConfigError(
            f"rollout.vllm.replicas={settings.replicas} but rollout.vllm.servers names {len(settings.servers)}: leave one out"
        )
    for address in settings.servers:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"rollout.vllm.servers: '{address}' is not host:port")


def _check_overlap(config: Config) -> None:
    """Check the settings for work that overlaps with the servers' sampling."""
    rollout = config.rollout
    if config.teacher.score_while_sampling and (not engines_have_own_gpus(rollout) or rollout.steps_ahead):
        raise ConfigError(
            "teacher.score_while_sampling=true needs an engine that samples this step's responses on separate devices: set "
            "rollout=vllm, rollout.vllm.placement=server and rollout.steps_ahead=0"
        )
    if rollout.max_continuations is not None and rollout.partial_tokens is None:
        raise ConfigError("rollout.max_continuations is for responses in parts: set rollout.partial_tokens, or leave it out")
    if not rollout.steps_ahead:
        if rollout.partial_tokens is not None:
            raise ConfigError("rollout.partial_tokens needs prompts of further steps: set rollout.steps_ahead to at least 1")
        for name, is_set in (("max_age", rollout.max_age is not None), ("unfinished", rollout.unfinished != "wait")):
            if is_set:
                raise ConfigError(
                    f"rollout.{name} is for responses that are sampled ahead: set rollout.steps_ahead, or leave it out"
                )
        return
    if rollout.max_age is not None and rollout.max_age < rollout.steps_ahead:
        raise ConfigError(
            f"rollout.max_age={rollout.max_age} is less than rollout.steps_ahead={rollout.steps_ahead}, the age of responses "
            "that are trained on in order: raise it, or lower steps_ahead"
        )
    if rollout.partial_tokens is not None:
        if rollout.unfinished != "wait":
            raise ConfigError(
                f"rollout.unfinished={rollout.unfinished} is for servers that sample while the student trains; with "
                "rollout.partial_tokens no engine does: leave one out"
            )
        if rollout.partial_tokens > rollout.max_response_tokens:
            raise ConfigError(
                f"rollout.partial_tokens={rollout.partial_tokens} is more than rollout.max_response_tokens="
                f"{rollout.max_response_tokens}: no response would be continued; lower it"
            )
    elif not engines_have_own_gpus(rollout):
        raise ConfigError(
            f"rollout.steps_ahead={rollout.steps_ahead} needs an engine that does not share the training's devices: set "
            "rollout=vllm and rollout.vllm.placement=server, or rollout.partial_tokens"
        )
    objective = config.objective
    corrects = objective.sampler_correction.kind != "none" or objective.clip_against == "sampler"
    if can_be_positive(objective.alpha) and not corrects:
        raise ConfigError(
            f"rollout.steps_ahead={rollout.steps_ahead} trains on responses of older weights: set "
            "objective.sampler_correction.kind=truncate or mask, or objective.clip_against=sampler"
        )


def _check_objective(config: Config) -> None:
    objective, updates = config.objective, config.batch.updates_per_step
    if updates > config.rollout.prompts_per_step and not replays(config):
        raise ConfigError(
            f"batch.updates_per_step={updates} is more than rollout.prompts_per_step={config.rollout.prompts_per_step}: each "
            "update needs at least one prompt"
        )
    check_teacher_servers(config)
    if is_supervised(objective):
        if config.rollout.given.share or config.rollout.given.path:
            raise ConfigError(
                "rollout.given adds given responses to sampled ones, but objective=sft trains only on given ones: leave it out"
            )
        return
    if learns_from_reward(objective) and not replays(config) and config.rollout.responses_per_prompt == 1:
        raise ConfigError(
            "rollout.responses_per_prompt=1 has no group to compare with: GRPO needs at least 2 "
            "(or set objective.alpha.init=0 for plain distillation)"
        )
    check_teacher(config)
    check_teachers(config)
    for name, each in config.teachers.items():
        _check_schedule(f"teachers.{name}.share", each.share)
    in_advantage = objective.kd.placement == "advantage" and objective.kd.mix != "none"
    if objective.kd.placement != "loss" and objective.kd.estimator not in ("k1", "k2") and not in_advantage:
        raise ConfigError(
            f"objective.kd.placement={objective.kd.placement} uses the log-ratio itself; "
            f"objective.kd.estimator={objective.kd.estimator} only fits placement=loss"
        )
    check_axes(config)


def flatten(tree: Any) -> dict[str, Any]:
    """A nested configuration as `group.key: value`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat

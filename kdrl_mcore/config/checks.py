"""Checks of a configuration, made before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdrl_mcore.config.axes import check_axes
from kdrl_mcore.config.derived import (
    DISTRIBUTION,
    DOMAIN,
    ENTROPIES,
    TEACHER,
    bounds_importance,
    can_be_positive,
    engines_have_own_gpus,
    evaluates,
    learns_from_reward,
    loads_teacher,
    may_teach_together,
    replays,
    teaches_itself,
    uses_distributed_optimizer,
    uses_given,
    uses_teacher,
    wanted_scores,
    weighs_by_scores,
)
from kdrl_mcore.config.engine_arguments import extra_arguments
from kdrl_mcore.config.keys import CHOICES, RANGES, TAKE_FUNCTIONS, general_name, key_types, nearest
from kdrl_mcore.config.ranges import check_number, numbers
from kdrl_mcore.config.schema import (
    DEFAULT_RECOMPUTE,
    LOGGERS,
    LORA_MODULES,
    OFFLOAD_MODULES,
    OWN_SCALES,
    RECOMPUTE_MODULES,
    REWARD_KINDS,
    Config,
    DataConfig,
    LoraConfig,
    NamedTeacherConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    ScheduleConfig,
    SourceConfig,
    TeacherConfig,
    TeacherParallelConfig,
    TeacherPromptConfig,
    VllmConfig,
)
from kdrl_mcore.errors import ConfigError

MAY_BE_EMPTY = ("cluster.name",)
"""Keys whose text may be empty; for all others an empty text counts as a forgotten value."""

RECOMPUTED_PARTS = {
    "core_attn": ("core_attn",),
    "layernorm": ("qkv_linear", "mlp", "moe"),  # each begins with its norm
    "mlp": ("mlp",),
    "moe": ("moe",),
    "moe_act": ("moe",),
}
"""For each recomputed module, the off-loadable parts that contain it."""


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
    _check_layout(config.parallel)
    _check_activations(config.parallel)
    if config.rollout.engine == "replay" and not config.rollout.path:
        raise ConfigError("rollout=replay needs rollout.path=FILE, a rollout file (JSONL)")
    if config.rollout.engine == "vllm":
        _check_vllm(config.rollout.vllm)
    _check_optimizer(config.optimizer)
    _check_overlap(config)
    _check_reduction(config)
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


def domain_name(source: SourceConfig) -> str:
    """The name of a source in metrics and rollout files: its `name`, or else that of its file or hub id."""
    if source.name is not None:
        return source.name
    return Path(without_revision(str(source.path)).removesuffix(".gz")).stem


def without_revision(source: str) -> str:
    """A hub id without its `@revision`; the name of a file unchanged."""
    is_file = source.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))
    return source if is_file else source.partition("@")[0]


def _check_items(flat: dict[str, Any]) -> None:
    """Check the types of list items, which Hydra does not check for nested lists."""
    types_of = key_types()
    for name, value in flat.items():
        types = types_of.get(f"{general_name(name)}[]")
        for index, item in enumerate(value if types is not None else ()):
            if not isinstance(item, types or ()):
                raise ConfigError(f"{name}[{index}]: Cannot convert {item!r} to {(types or (str,))[0].__name__}")


def _check_lora(config: Config) -> None:
    """Check the adapters' settings; model/lora.py checks them against the model."""
    lora = config.student.lora
    if lora.rank == 0:
        defaults = LoraConfig()
        for name in ("alpha", "target_modules", "path"):
            if getattr(lora, name) != getattr(defaults, name):
                raise ConfigError(f"student.lora.{name} is for adapters: set student.lora.rank > 0, or leave it out")
        return
    if not lora.target_modules:
        raise ConfigError("student.lora.target_modules is empty, so nothing would be trained: name some, or set rank to 0")
    for name in lora.target_modules:
        if name not in LORA_MODULES:
            raise ConfigError(
                f"student.lora.target_modules: {name} is not one of: {', '.join(LORA_MODULES)}{nearest(name, LORA_MODULES)}"
            )
        if lora.target_modules.count(name) > 1:
            raise ConfigError(f"student.lora.target_modules names {name} twice: leave one out")


def _check_layout(parallel: ParallelConfig) -> None:
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError("parallel.sequence_parallel=true needs parallel.tensor > 1")
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} cuts the layers of pipeline ranks: it needs "
            "parallel.pipeline > 1 (or set it to null)"
        )


def _check_activations(parallel: ParallelConfig) -> None:
    """Check which activations are recomputed and off-loaded; model/activations.py checks them against the model."""
    recomputed, offloaded = parallel.recompute_modules, parallel.offload_activations
    for key, names, known in (
        ("recompute_modules", recomputed, RECOMPUTE_MODULES),
        ("offload_activations", offloaded, OFFLOAD_MODULES),
    ):
        for name in names:
            if name not in known:
                raise ConfigError(f"parallel.{key}: {name} is not one of: {', '.join(known)}{nearest(name, known)}")
            if names.count(name) > 1:
                raise ConfigError(f"parallel.{key} names {name} twice: leave one out")
    if "attn_proj" in offloaded and "core_attn" not in offloaded:
        raise ConfigError(
            "parallel.offload_activations: the input of attn_proj is the output of core_attn, which also keeps it: name both"
        )
    if parallel.recompute != "selective":
        if sorted(recomputed) != sorted(DEFAULT_RECOMPUTE):
            raise ConfigError("parallel.recompute_modules needs parallel.recompute=selective")
        if parallel.recompute == "full" and offloaded:
            raise ConfigError(
                "parallel.recompute=full keeps only the inputs of layers, so parallel.offload_activations has nothing to move: "
                "leave it out, or set parallel.recompute=selective"
            )
        return
    if not recomputed:
        raise ConfigError("parallel.recompute=selective with no parallel.recompute_modules: name some, or set it to none")
    if "moe" in recomputed and "moe_act" in recomputed:
        raise ConfigError("parallel.recompute_modules: moe already recomputes moe_act; leave one out")
    for module, parts in RECOMPUTED_PARTS.items():
        both = [part for part in offloaded if module in recomputed and part in parts]
        if both:
            raise ConfigError(
                f"parallel.recompute_modules has {module} and parallel.offload_activations has {both[0]}, which covers it: "
                "recomputed activations are not kept, so leave one out"
            )


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


def _check_reduction(config: Config) -> None:
    """Check how gradients are reduced and updated weights are gathered."""
    parallel = config.parallel
    for key, cut in (
        ("parallel.bucket_size", parallel.bucket_size is not None),
        ("parallel.overlap_param_gather", parallel.overlap_param_gather),
    ):
        if cut and not parallel.overlap_grad_reduce:
            raise ConfigError(f"{key} needs buckets, which exist only with parallel.overlap_grad_reduce=true")
    if parallel.overlap_param_gather and not uses_distributed_optimizer(config):
        raise ConfigError(
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and optimizer.name=adam: otherwise "
            "every rank updates all its weights and gathers none"
        )


def _check_objective(config: Config) -> None:
    objective, updates = config.objective, config.batch.updates_per_step
    if updates > config.rollout.prompts_per_step and not replays(config):
        raise ConfigError(
            f"batch.updates_per_step={updates} is more than rollout.prompts_per_step={config.rollout.prompts_per_step}: each "
            "update needs at least one prompt"
        )
    if objective.kind == "sft":
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
    _check_teacher(config)
    check_teachers(config)
    in_advantage = objective.kd.placement == "advantage" and objective.kd.mix != "none"
    if objective.kd.placement != "loss" and objective.kd.estimator not in ("k1", "k2") and not in_advantage:
        raise ConfigError(
            f"objective.kd.placement={objective.kd.placement} uses the log-ratio itself; "
            f"objective.kd.estimator={objective.kd.estimator} only fits placement=loss"
        )
    check_axes(config)


def _check_teacher(config: Config) -> None:
    teacher, prompt = config.teacher, config.teacher.prompt
    name = f"teacher.weights={teacher.weights}"
    if loads_teacher(config) and not teacher.path and not config.teachers:
        raise ConfigError(
            "objective.beta is positive but teacher.path is not set: name the teacher, let the student teach itself "
            "(teacher.weights), or use objective=grpo"
        )
    if teacher.weights != "path":
        if not uses_teacher(config.objective):
            raise ConfigError(f"{name} teaches, but objective.beta is never positive: leave it at path")
        if teacher.path and teaches_itself(config):
            raise ConfigError(f"{name} are the student's own, and teacher.path={teacher.path} is not read: leave one out")
        if teacher.weights == "base" and config.student.lora.rank == 0:
            raise ConfigError(
                f"{name} are the weights without adapters, but student.lora.rank=0 has none: set the rank, or other weights"
            )
        if prompt.template == "student" and teacher.weights == "present":
            raise ConfigError(
                f"{name} with the student's own prompt is the student itself: set teacher.prompt.template, or other weights"
            )
        if teacher.parallel != TeacherParallelConfig():
            raise ConfigError(f"{name} has no separate layout: leave teacher.parallel alone")
        if teacher.score_while_sampling:
            raise ConfigError(f"{name} score only between sampling and training: set teacher.score_while_sampling=false")
    if teacher.weights == "recorded":
        _check_recorded(config)
    for key, kind in (("decay", "average"), ("refresh_every", "refreshed"), ("min_ess", "recorded")):
        if getattr(teacher, key) != getattr(TeacherConfig, key) and teacher.weights != kind:
            raise ConfigError(f"teacher.{key}={getattr(teacher, key):g} belongs to teacher.weights={kind}: leave it out")
    check_teacher_prompt(prompt, "teacher.prompt")
    if prompt.template != "student" and not uses_teacher(config.objective):
        raise ConfigError(
            f"teacher.prompt.template={prompt.template} is read by no teacher: set objective.beta, or leave it out"
        )


def check_teachers(config: Config) -> None:
    """Check the settings of `teachers`.

    Raises:
        ConfigError: the message names the key.
    """
    if not config.teachers:
        return
    teacher = config.teacher
    if teacher != replace(TeacherConfig(), score_while_sampling=teacher.score_while_sampling):
        raise ConfigError(
            "teacher and teachers are both set: name one teacher, or several in teachers.NAME (of `teacher` only "
            "score_while_sampling concerns these)"
        )
    domains = [domain_name(source) for source in config.data.sources]
    for name, each in config.teachers.items():
        section = f"teachers.{name}"
        if not each.path:
            raise ConfigError(f"{section}.path is not set: name the teacher")
        if name == TEACHER:
            raise ConfigError(f"{section}: choose another name than {TEACHER}, which is that of an only teacher")
        check_teacher_prompt(each.prompt, f"{section}.prompt")
        _check_schedule(f"{section}.share", each.share)
        if not can_be_positive(each.share):
            raise ConfigError(f"{section}.share is never positive: leave this teacher out, or set {section}.share.init")
        if each.share.kind == "plateau" and not (evaluates(config) and config.eval.every > 0):
            raise ConfigError(
                f"{section}.share.kind=plateau watches eval/accuracy: set eval.every and something to evaluate on"
            )
        _check_taught_values(config, section, each, domains)
    if uses_teacher(config.objective):
        _check_mixture(config)


def _check_taught_values(config: Config, section: str, teacher: NamedTeacherConfig, domains: Sequence[str]) -> None:
    column = f"{section}.column={teacher.column}"
    if len(set(teacher.values)) < len(teacher.values):
        raise ConfigError(f"{section}.values names a value twice: leave one out")
    if not teacher.values:
        if teacher.column != DOMAIN:
            raise ConfigError(f"{column} without {section}.values teaches every prompt: name the values, or leave column out")
        return
    if teacher.column != DOMAIN and teacher.column not in config.data.columns:
        raise ConfigError(f"{column} is not among the columns that are read: add it to data.columns")
    if teacher.column != DOMAIN and replays(config):
        raise ConfigError(f"{column}: rollout files hold no columns of the data; with rollout=replay choose by domain")
    if teacher.column != DOMAIN or DOMAIN in config.data.columns or replays(config):
        return
    if not domains:
        raise ConfigError(f"{section}.values are domains, but the data have none: name them in data.sources")
    for value in teacher.values:
        if value not in domains:
            there = f"there are: {', '.join(domains)}{nearest(value, domains)}"
            raise ConfigError(f"{section}.values: no domain of data.sources is called '{value}'; {there}")


def _check_mixture(config: Config) -> None:
    """Check the settings that cannot be computed exactly where several teachers teach one prompt, or where their shares make
    beta differ by prompt."""
    objective, kd = config.objective, config.objective.kd
    if objective.combine.kind in ("modulate", "ratio", "reference"):
        raise ConfigError(
            f"objective.combine.kind={objective.combine.kind} has one beta for all prompts, which the shares of teachers would "
            "make differ: use another rule, or one teacher"
        )
    if not may_teach_together(config):
        return
    together = "several teachers may teach one prompt"
    over = "control_variate=true" if kd.control_variate else f"estimator={kd.estimator}"
    if kd.mixture == "arithmetic":
        if DISTRIBUTION in wanted_scores(objective):
            raise ConfigError(
                f"{together}, and with objective.kd.mixture=arithmetic only k1, k2 and k3 are exact, not objective.kd.{over}: "
                "set mixture=geometric, or give each prompt one teacher"
            )
        if ENTROPIES in wanted_scores(objective):
            raise ConfigError(
                f"{together}, and objective.kd.token_weight.kind={kd.token_weight.kind} needs the entropy of their mixture, "
                "which does not follow from theirs: use another rule, or give each prompt one teacher"
            )
        return
    needs_log_probs = {
        f"kd.token_weight.kind={kd.token_weight.kind}": weighs_by_scores(objective)
        or kd.token_weight.kind == "teacher_entropy",
    }
    if DISTRIBUTION not in wanted_scores(objective):  # otherwise the mixture is formed over the vocabulary
        needs_log_probs |= {
            f"kd.estimator={kd.estimator}": kd.estimator not in ("k1", "k2"),
            f"kd.placement={kd.placement}": kd.placement == "reward",
            f"kd.clamp={kd.clamp}": kd.clamp is not None,
            f"kd.importance={kd.importance}": bounds_importance(kd),
            f"combine.kind={objective.combine.kind}": objective.combine.kind not in ("add", "gate"),
        }
    for key, needs in needs_log_probs.items():
        if needs:
            raise ConfigError(
                f"{together}, and objective.{key} needs the log-probs of their normalised geometric mixture, which k1 and k2 "
                "do without: set objective.kd.mixture=arithmetic, or give each prompt one teacher"
            )


def check_teacher_prompt(prompt: TeacherPromptConfig, section: str) -> None:
    """Check what a teacher reads before a response, whose settings are in `section`.

    Raises:
        ConfigError: a setting has no effect.
    """
    used = {"student": (), "plain": ("plain_template", "max_tokens"), "chat": tuple(asdict(prompt))}[prompt.template]
    for key, default in asdict(TeacherPromptConfig()).items():
        if key not in ("template", *used) and getattr(prompt, key) != default:
            raise ConfigError(
                f"{section}.{key} has no effect with {section}.template={prompt.template}: set the template, or leave it out"
            )
    if prompt.template == "chat" and prompt.plain_template != TeacherPromptConfig.plain_template:
        raise ConfigError(f"{section}.plain_template belongs to {section}.template=plain: leave one out")


def _check_recorded(config: Config) -> None:
    name, kd = "teacher.weights=recorded", config.objective.kd
    if not replays(config):
        raise ConfigError(f"{name} reads scores from a rollout file: set rollout=replay and rollout.path")
    if DISTRIBUTION in wanted_scores(config.objective):
        key = "control_variate=true" if kd.control_variate else f"estimator={kd.estimator}"
        raise ConfigError(
            f"{name} has the teacher's log-probs of the sampled tokens only, but objective.kd.{key} needs its whole "
            "distribution: set objective.kd.estimator to k1, k2 or k3, without control_variate"
        )
    if uses_given(config):
        raise ConfigError(f"{name} has no scores of given responses: set rollout.given.share=0")


def flatten(tree: Any) -> dict[str, Any]:
    """A nested configuration as `group.key: value`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{inner}": each for inner, each in flatten(value).items()})
        else:
            flat[str(key)] = value
    return flat

"""Facts that follow from the configuration alone, one function each."""

from __future__ import annotations

import math
from pathlib import Path

from kdrl_mcore.config.schema import (
    ClusterConfig,
    Config,
    DistillationConfig,
    ModelConfig,
    NamedTeacherConfig,
    ObjectiveConfig,
    RolloutConfig,
    ScheduleConfig,
    SourceConfig,
    TeacherConfig,
    TeacherPromptConfig,
)
from kdrl_mcore.errors import ConfigError

OVER_THE_VOCABULARY = ("exact", "top_k", "top_k_unbiased")
"""The estimators that need the teacher's whole distribution, not only its log-probs of the sampled tokens."""

LOG_PROBS, ENTROPIES, DISTRIBUTION = "log_probs", "entropies", "distribution"
"""The scores of a token that a teacher can give: log T of the sampled one, the entropy of T, and all of T (as a hidden state,
with the teacher's output head)."""

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can reserve memory."""

TEACHER = "teacher"
"""The name of the only teacher, and of its prompts in rollouts."""

DOMAIN = "domain"
"""The column of a prompt's domain, which every prompt has."""

TEACH_INCORRECT = ("gate",)
"""The rules of `objective.combine` that distil only incorrect responses, so that the teacher scores no others."""

SWITCHES = ("switch", "below", "plateau")
"""The schedules that change from `init` to `after` in one step."""

WEIGHTS_OF_SCORES = ("entropy", "magnitude", "trusted_prefix")
"""The rules of `objective.kd.token_weight` that compare both models' scores of whole responses."""


def can_be_positive(schedule: ScheduleConfig) -> bool:
    """Whether a coefficient schedule is, or with a user's function may be, above zero at some step."""
    if ":" in schedule.kind:
        return True
    values = {
        "constant": (schedule.init,),
        **dict.fromkeys(SWITCHES, (schedule.init, schedule.after, schedule.delta and schedule.min, -schedule.delta)),
        "linear": (schedule.init, schedule.min, -schedule.delta),  # with a negative delta it grows
    }
    return max(values.get(schedule.kind, (schedule.init, schedule.min))) > 0


def is_supervised(objective: ObjectiveConfig) -> bool:
    """Whether the run is supervised fine-tuning on given responses: nothing is sampled, rewarded or distilled."""
    return objective.kind == "sft"


def learns_from_reward(objective: ObjectiveConfig) -> bool:
    """Whether the loss has the GRPO term at some step."""
    return not is_supervised(objective) and can_be_positive(objective.alpha)


def uses_teacher(objective: ObjectiveConfig) -> bool:
    """Whether the loss has the distillation term at some step, so that a teacher is loaded."""
    return not is_supervised(objective) and can_be_positive(objective.beta)


def teaches_itself(config: Config) -> bool:
    """Whether the student, with its present or earlier weights, is the teacher, so that no second model is loaded."""
    return uses_teacher(config.objective) and config.teacher.weights not in ("path", "recorded")


def has_separate_teacher(config: Config) -> bool:
    """Whether the teacher is a model other than the student, or several are."""
    return uses_teacher(config.objective) and config.teacher.weights == "path"


def has_several_teachers(config: Config) -> bool:
    """Whether the teachers are those of `teachers`."""
    return has_separate_teacher(config) and bool(config.teachers)


def separate_teachers(config: Config) -> dict[str, TeacherConfig | NamedTeacherConfig]:
    """The models other than the student that teach, by name, with their settings; the only one is called `TEACHER`."""
    if not has_separate_teacher(config):
        return {}
    return {**config.teachers} if config.teachers else {TEACHER: config.teacher}


def loaded_teachers(config: Config) -> dict[str, TeacherConfig | NamedTeacherConfig]:
    """Those of `separate_teachers` in this job."""
    return {name: each for name, each in separate_teachers(config).items() if not is_served(each)}


def served_teachers(config: Config) -> dict[str, TeacherConfig | NamedTeacherConfig]:
    """Those of `separate_teachers` on servers."""
    return {name: each for name, each in separate_teachers(config).items() if is_served(each)}


def is_served(teacher: TeacherConfig | NamedTeacherConfig) -> bool:
    """Whether a teacher is on servers, so that its weights are not loaded in this job."""
    return teacher.server.kind != "none"


def teacher_heads(config: Config) -> dict[str, TeacherConfig | NamedTeacherConfig]:
    """The separate teachers whose output heads the student holds: those that give hidden states, where the loss compares both
    models over the vocabulary."""
    if not compares_over_vocabulary(config.objective):
        return {}
    return {name: each for name, each in separate_teachers(config).items() if each.server.kind != "completions"}


def knows_top_k(config: Config) -> bool:
    """Whether the loss compares both models on the teacher's most likely tokens as servers report them, so that the student
    does not compute the teacher's logits."""
    found = separate_teachers(config).values()
    return compares_over_vocabulary(config.objective) and any(each.server.kind == "completions" for each in found)


def section_of(config: Config, name: str) -> str:
    """Where a teacher's settings are in the configuration."""
    return f"teachers.{name}" if config.teachers else TEACHER


def prompts_of_teachers(config: Config) -> dict[str, TeacherPromptConfig]:
    """The templates of the teachers that read other prompts than the student, by the name of these prompts in rollouts."""
    if not uses_teacher(config.objective):
        return {}
    found = {name: each.prompt for name, each in config.teachers.items()} or {TEACHER: config.teacher.prompt}
    return {name: prompt for name, prompt in found.items() if prompt.template != "student"}


def may_teach_together(config: Config) -> bool:
    """Whether two of `teachers` may teach one prompt, as far as the configuration shows: those that choose by the same column
    teach one only if they share a value."""
    teachers = list(config.teachers.values()) if has_several_teachers(config) else []
    pairs = [(one, other) for index, one in enumerate(teachers) for other in teachers[:index]]
    return any(
        one.column != other.column or not one.values or not other.values or set(one.values) & set(other.values)
        for one, other in pairs
    )


def reads_scores(config: Config) -> bool:
    """Whether the teacher's scores are in the rollout file that is replayed."""
    return uses_teacher(config.objective) and config.teacher.weights == "recorded"


def keeps_earlier_weights(config: Config) -> bool:
    """Whether the student keeps earlier weights in addition to the present ones, in float32 and sharded as the optimizer's
    state is: 4 bytes per parameter, divided among its replicas."""
    return teaches_itself(config) and config.teacher.weights not in ("present", "base", "adapters")


def shares_teacher_head(config: Config) -> bool:
    """Whether the teacher's output head is the student's at every update, so that no copy of it is needed: the student teaches
    itself with its present weights and makes one update per batch, or its head is frozen under adapters."""
    same_weights = config.teacher.weights == "present" and config.batch.updates_per_step == 1
    return teaches_itself(config) and (same_weights or config.student.lora.rank > 0)


def reads_own_prompt(config: Config) -> bool:
    """Whether the teacher reads another prompt than the student."""
    return TEACHER in prompts_of_teachers(config)


def teacher_prompt_tokens(config: Config, name: str = TEACHER) -> int:
    """The most tokens that a teacher reads before a response."""
    prompt = prompts_of_teachers(config).get(name)
    return (prompt is not None and prompt.max_tokens) or config.rollout.max_prompt_tokens


def uses_reference(objective: ObjectiveConfig) -> bool:
    """Whether the loss has a KL to the initial student, which is then loaded as the reference."""
    extrapolates = objective.combine.kind == "reference" and objective.combine.extrapolation != 1
    return not is_supervised(objective) and (
        objective.reference_kl.coefficient > 0 or (extrapolates and uses_teacher(objective))
    )


def teaches_by_advantage(objective: ObjectiveConfig) -> bool:
    """Whether the rule of `objective.combine` ignores the teacher where the advantage is 0, so that the teacher need not score
    groups with equal rewards."""
    combine = objective.combine
    return combine.kind in ("modulate", "ratio") or (combine.kind == "relu" and combine.signal == "advantage")


def weighs_by_scores(objective: ObjectiveConfig) -> bool:
    """Whether the rule of `objective.kd.token_weight` compares both models' scores of whole responses, as a user's function
    may."""
    kind = objective.kd.token_weight.kind
    return kind in WEIGHTS_OF_SCORES or ":" in kind


def bounds_importance(kd: DistillationConfig) -> bool:
    """Whether the importance weights of distillation are anything but each token's pi / mu."""
    return kd.importance != "full" or kd.importance_level != "token"


def needs_teacher_scores(objective: ObjectiveConfig) -> bool:
    """Whether a divergence over the vocabulary is combined with token weights that need the teacher's log-probs or entropies of
    whole responses, so that the teacher's pass also runs its output head: 2 G V FLOP per token, G its hidden size."""
    weighs = weighs_by_scores(objective) or objective.kd.token_weight.kind == "teacher_entropy"
    return compares_over_vocabulary(objective) and weighs


def wanted_scores(objective: ObjectiveConfig) -> frozenset[str]:
    """What the loss needs of each token that the teacher scores."""
    if not uses_teacher(objective):
        return frozenset()
    kind, values = objective.kd.token_weight.kind, {LOG_PROBS}
    if kind == "teacher_entropy" or ":" in kind:
        values.add(ENTROPIES)
    if not compares_over_vocabulary(objective):
        return frozenset(values)
    return frozenset({DISTRIBUTION, *(values if needs_teacher_scores(objective) else ())})


def needs_scores(config: Config) -> bool:
    """Whether a setting needs log pi (or the entropy) of whole responses at the weights that an update begins with, so that a
    pass without gradient comes before it: 2 of the update's 6 FLOP per parameter and token."""
    objective, several = config.objective, config.batch.updates_per_step > 1
    return not is_supervised(objective) and (
        (objective.ratio != "token" and (several or objective.clip_against == "sampler"))
        or (objective.sampler_correction.kind != "none" and objective.sampler_correction.level != "token" and not several)
        or (uses_teacher(objective) and (weighs_by_scores(objective) or objective.kd.importance_level != "token"))
    )


def compares_over_vocabulary(objective: ObjectiveConfig) -> bool:
    """Whether the loss compares student and teacher over the vocabulary, so that the student also loads the teacher's head."""
    return uses_teacher(objective) and (objective.kd.estimator in OVER_THE_VOCABULARY or objective.kd.control_variate)


def replays(config: Config) -> bool:
    """Whether every step trains on the responses of a rollout file instead of prompts."""
    return not is_supervised(config.objective) and config.rollout.engine == "replay"


def samples(config: Config) -> bool:
    """Whether the responses that a step trains on are sampled, that is, neither given (sft) nor replayed."""
    return not is_supervised(config.objective) and config.rollout.engine != "replay"


def longest_response(config: Config) -> int | None:
    """The most tokens of a sampled response; None if no responses are sampled."""
    return config.rollout.max_response_tokens if samples(config) else None


def uses_given(config: Config) -> bool:
    """Whether a step distils given responses in addition to the others."""
    return not is_supervised(config.objective) and config.rollout.given.share > 0


def reads_responses(config: Config) -> bool:
    """Whether the training data must hold a response to each prompt."""
    return is_supervised(config.objective) or (uses_given(config) and config.rollout.given.path is None)


def num_given(config: Config, others: int) -> int:
    """The number of given responses that, added to `others`, make up `rollout.given.share` of all."""
    share = config.rollout.given.share
    return round(others * share / (1 - share)) if uses_given(config) else 0


def samples_with_vllm(config: Config) -> bool:
    """Whether vLLM's engines sample the responses that a step trains on."""
    return samples(config) and config.rollout.engine == "vllm"


def is_on_policy(config: Config) -> bool:
    """Whether every update uses the weights that sampled its batch."""
    return samples(config) and config.rollout.steps_ahead == 0 and config.batch.updates_per_step == 1


def truncates(config: Config) -> bool:
    """Whether `top_p`, `top_k` or `min_p` truncate the student's distribution, in sampling and in training."""
    rollout = config.rollout
    return not is_supervised(config.objective) and (rollout.top_p < 1 or rollout.top_k > 0 or rollout.min_p > 0)


def longest_evaluated(config: Config) -> int:
    """The most tokens of a response in an evaluation."""
    own = config.eval.max_response_tokens
    return config.rollout.max_response_tokens if own is None else own


def evaluated_limit(config: Config) -> tuple[int, str]:
    """`longest_evaluated`, and the key that sets it."""
    section = "rollout" if config.eval.max_response_tokens is None else "eval"
    return longest_evaluated(config), f"{section}.max_response_tokens"


def max_engine_tokens(config: Config) -> int:
    """The tokens of the longest prompt with the longest response that an engine samples, in training or in an evaluation."""
    own = longest_evaluated(config) if evaluates(config) else 0
    return config.rollout.max_prompt_tokens + max(config.rollout.max_response_tokens, own)


def max_sequence_tokens(rollout: RolloutConfig) -> int:
    """The tokens of the longest prompt with the longest response."""
    return rollout.max_prompt_tokens + rollout.max_response_tokens


def engines_share_gpus(rollout: RolloutConfig) -> bool:
    """Whether vLLM's engines are on the GPUs that train."""
    return rollout.engine == "vllm" and rollout.vllm.placement == "colocated"


def engines_have_own_gpus(rollout: RolloutConfig) -> bool:
    """Whether vLLM's engines are servers with their own devices, so that they can sample while the ranks do other work."""
    return rollout.engine == "vllm" and rollout.vllm.placement == "server"


def evaluates(config: Config) -> bool:
    """Whether there is something to evaluate on, and evaluation is not off."""
    named = config.data.eval or config.eval.benchmarks or any(source.eval for source in config.data.sources)
    return config.eval.every >= 0 and bool(named)


def num_updates(config: Config) -> int:
    """The number of optimizer updates of the whole run."""
    return config.trainer.steps * config.batch.updates_per_step


def uses_distributed_optimizer(config: Config) -> bool:
    """Whether data-parallel ranks share the optimizer's state."""
    return config.parallel.distributed_optimizer and config.optimizer.name == "adam"


def asks_for_transformer_engine(model: ModelConfig) -> bool | None:
    """Whether the layers are to be made of Transformer Engine's modules; None leaves it to whether it can be used.

    `model.spec=auto` never uses them in float32, which Transformer Engine multiplies in TF32 with rounding errors a thousand
    times as large.
    """
    if model.spec == "auto":
        return None if model.dtype != "float32" else False
    return model.spec == "transformer_engine"


def used_models(config: Config) -> dict[str, str]:
    """The paths of the models in this job that process training sequences, by role: "student" and, if used, "teacher" (one of
    several is "teacher NAME").

    Raises:
        ConfigError: `student.path` is not set.
    """
    if not config.student.path:
        raise ConfigError("student.path is not set: name an HF model directory")
    models = {"student": config.student.path}
    for name, teacher in loaded_teachers(config).items():
        assert teacher.path is not None
        models[role_of(name)] = teacher.path
    return models


def known_models(config: Config) -> dict[str, str]:
    """`used_models`, and the paths of teachers on servers where they are named: of these the tokenizer and `config.json` are
    read, and the output head, if the loss needs it.

    Raises:
        ConfigError: `student.path` is not set.
    """
    served = {role_of(name): teacher.path for name, teacher in served_teachers(config).items() if teacher.path}
    return {**used_models(config), **served}


def role_of(teacher: str) -> str:
    """What a teacher is called among the models of a run."""
    return TEACHER if teacher == TEACHER else f"teacher {teacher}"


def training_ranks(cluster: ClusterConfig) -> int:
    """The number of ranks that train, one on each GPU of `cluster.nodes`."""
    return cluster.nodes * cluster.gpus_per_node


def ranks_per_node(config: Config, gpus: int) -> int:
    """One rank per configured GPU. Without GPUs, ranks are plain processes, at least as many as both layouts need.

    Args:
        gpus: the number of GPUs of a node.
    """
    per_node = config.cluster.gpus_per_node
    if gpus:
        return per_node
    student = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    teachers = config.teachers.values() if config.teachers else [config.teacher]
    ranks = [each.parallel.tensor * each.parallel.pipeline for each in teachers if not is_served(each)]
    return max(per_node, -(-math.lcm(student, *ranks) // config.cluster.nodes))


def servers_per_node(config: Config, gpus: int) -> int:
    """The number of engines that fit on a node of `cluster.server_nodes`; one without GPUs.

    Args:
        gpus: the number of GPUs of a node.

    Raises:
        ConfigError: no engine fits.
    """
    per_node, tensor = config.cluster.gpus_per_node, config.rollout.vllm.tensor
    if gpus and config.cluster.server_nodes and tensor > per_node:
        raise ConfigError(f"rollout.vllm.tensor={tensor} does not fit a server node of {per_node} GPUs: change it")
    return per_node // tensor if gpus else 1


def server_arguments(config: Config, model: str | Path, share: float | None) -> list[str]:
    """The command-line arguments of vLLM's servers that follow from the configuration. The weights come from the trainer.

    Args:
        model: the directory of the student's configuration.
        share: the engine's share of a GPU's memory; None leaves it to the server.
    """
    rollout = config.rollout
    values = {
        "model": model,
        "dtype": config.model.dtype,
        "max-model-len": max_engine_tokens(config),
        "max-sequences": rollout.max_sequences,
        "tensor": rollout.vllm.tensor,
        "kv-cache-gib": rollout.vllm.kv_cache_gib,
        "seed": config.trainer.seed,
        "load-format": "dummy",  # the weights come with a refit; until then the server refuses to sample
    }
    if rollout.vllm.refit_adapters:
        rank = next(rank for rank in LORA_RANKS if rank >= config.student.lora.rank)
        values |= {"load-format": "auto", "lora-rank": rank}  # only adapters come with a refit
    if rollout.replay_experts:
        values["return-experts"] = 1
    if share is not None:
        values["gpu-memory-utilization"] = share
    extra = [word for argument in rollout.vllm.extra for word in ("--extra", argument)]
    return [word for name, value in values.items() for word in (f"--{name}", str(value))] + extra


def domain_name(source: SourceConfig) -> str:
    """The name of a source in metrics and rollout files: its `name`, or else that of its file or hub id."""
    if source.name is not None:
        return source.name
    return Path(without_revision(str(source.path)).removesuffix(".gz")).stem


def without_revision(source: str) -> str:
    """A hub id without its `@revision`; the name of a file unchanged."""
    is_file = source.removesuffix(".gz").endswith((".jsonl", ".json", ".parquet"))
    return source if is_file else source.partition("@")[0]

"""All configuration keys. The default, meaning and allowed values of each are defined only here."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from kdrl_mcore.config.key import key
from kdrl_mcore.config.ranges import (
    COUNT,
    COUNT_OR_OFF,
    DECAY,
    DEGREE,
    EVERY,
    LARGE,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SECONDS,
    SEED,
    SHARE,
    SIGNED,
    TEMPERATURE,
    YEAR,
    Range,
)

RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")
"""Megatron-Core's names of what selective recompute covers (model/activations.py)."""
DEFAULT_RECOMPUTE = ("mlp", "moe")
OFFLOAD_MODULES = ("qkv_linear", "core_attn", "attn_proj", "mlp", "moe")
"""The parts of a layer whose saved activations can be moved to host memory (model/offload.py)."""
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that can have adapters (model/lora_targets.py)."""
LORA_HEAD = "lm_head"
"""The output head, which can have one, too."""
LORA_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""The weights of experts that can have adapters, by the names of the parameters in which `transformers` holds those of all
experts of a layer."""


@dataclass
class RunConfig:
    """Where the run lives on disk."""

    dir: str = key("runs/default", "the run directory: config, metrics, rollouts, checkpoints, final export")


@dataclass
class ProfileConfig:
    """Traces of single steps, for torch's profiler viewers (docs/operations.md)."""

    steps: list[int] = key([], "steps to trace, such as [3,4]; a trace of a large step takes gigabytes", range=COUNT)
    ranks: list[int] = key([0], "ranks that write a trace, in RUN/profile", range=COUNT_OR_OFF)


@dataclass
class TrainerConfig:
    """Length and reproducibility of the run."""

    steps: int = key(100, "training steps (one rollout batch each); 0 only evaluates, once", range=COUNT_OR_OFF)
    seed: int = key(
        1, "determines data order, sampling and evaluation: every draw is a function of (seed, step, sample)", range=SEED
    )
    self_test: bool = key(
        True, "check at the start, in seconds, that sampler and trainer agree and that vocabulary-parallel sums are right"
    )
    deterministic: bool = key(False, "deterministic kernels: the same run gives the same bits")
    max_bad_updates: int = key(3, "abort after this many updates in a row skipped for NaN or Inf", range=COUNT)
    distributed_timeout_minutes: int = key(30, "a collective that hangs longer ends the job", range=Range(1, YEAR / 60))
    hang_timeout: float = key(
        1200.0,
        "seconds without progress on any rank after which the job ends, naming who hangs; 0 is off",
        range=Range(0, YEAR - 60),
    )
    stop_after: int = key(
        0, "evaluations in a row without a higher eval/accuracy after which the run ends; 0 is off", range=COUNT_OR_OFF
    )
    slow_ranks_every: int = key(
        10, "steps between comparisons of the ranks' own work, which name a slow one; 0 is off", range=COUNT_OR_OFF
    )
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass
class ModelConfig:
    """How Megatron-Core models are built, student and teacher alike."""

    dtype: str = key("float32", "float32 or bfloat16", choices=("float32", "bfloat16"))
    spec: str = key(
        "auto",
        "auto (Transformer Engine, where it imports, for bfloat16 on CUDA; or local), local, transformer_engine",
        choices=("auto", "local", "transformer_engine"),
    )
    router_bias_update: float = key(
        0.0,
        "how far an update moves the correction bias of each expert against its load, where routers have one (published models "
        "were trained with 0.001); 0 keeps it",
        range=NOT_NEGATIVE,
    )


@dataclass
class LoraConfig:
    """Low-rank adapters, which are trained in place of the student's weights (docs/lora.md)."""

    rank: int = key(0, "the rank of each adapter; 0 is off: all weights are trained", range=COUNT_OR_OFF)
    alpha: float = key(32.0, "adapters are scaled by alpha / rank", range=POSITIVE)
    target_modules: list[str] = key(
        list(LORA_MODULES), f"the projections that have adapters, of {', '.join((*LORA_MODULES, LORA_HEAD))}"
    )
    target_parameters: list[str] = key(
        [], f"the weights of experts that have adapters, of {', '.join(LORA_PARAMETERS)} (PEFT's setting of this name)"
    )
    path: str | None = key(None, "a PEFT folder with the adapters to start from; null: new ones, which at first change nothing")


@dataclass
class StudentConfig:
    """The model that learns."""

    path: str | None = key(None, "an HF checkpoint directory, or a hub id: org/name or org/name@revision")
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TeacherParallelConfig:
    """The teacher's own layout over the same ranks; its data-parallel size follows from the other sizes. Of a teacher on the
    nodes of `cluster.teacher_nodes`, `tensor` is the number of GPUs of one server."""

    tensor: int = key(1, "ranks that split each of its layers", range=DEGREE)
    pipeline: int = key(1, "stages of its layers", range=DEGREE)
    expert: int = key(1, "ranks that split its experts", range=DEGREE)


@dataclass
class TeacherPromptConfig:
    """What the teacher reads before a response, where it is not the student's prompt (docs/teachers.md). Its texts may contain
    {prompt}, {answer} and the columns of data.columns, such as {solution}."""

    template: str = key(
        "student",
        "student (the student's prompt, token by token), chat (the chat template of the teacher's own tokenizer) or plain",
        choices=("student", "chat", "plain"),
    )
    plain_template: str = key("{prompt}", "plain: the text; @FILE reads it from a file")
    message_template: str = key("{prompt}", "chat: the user's message; or @FILE")
    system_prompt: str | None = key(None, "chat: the system prompt, instead of the prompt's own; or @FILE")
    template_arguments: list[str] = key([], "chat: further variables of the template, such as [enable_thinking=false]")
    max_tokens: int | None = key(None, "the most tokens of this prompt; null: rollout.max_prompt_tokens", range=COUNT)


@dataclass
class TeacherServerConfig:
    """Servers that score with the teacher, elsewhere or in the same SLURM job (docs/teachers.md, "On a server")."""

    kind: str = key(
        "none",
        "none (the teacher is in this job), completions (vLLM's completions interface: log-probs, and those of its top k) or "
        "hidden_states (kdrl-serve-teacher --kind hidden_states: everything)",
        choices=("none", "completions", "hidden_states"),
    )
    urls: list[str] = key([], "their addresses, such as [http://node7:8000], which share the work; []: those in RUN/teachers")
    replicas: int = key(1, "urls=[]: the number of servers to wait for in RUN/teachers", range=DEGREE)
    model: str | None = key(None, "completions: the model's name on the servers; null: their only one")
    token_file: str | None = key(
        None, "a file with the bearer token of urls; null: the environment variable KDRL_TEACHER_TOKEN, if it is set"
    )
    concurrency: int = key(16, "requests in flight on each server, of the whole job", range=COUNT)
    batch_tokens: int = key(16384, "the most tokens of a request with several responses", range=COUNT)
    attempts: int = key(5, "tries of a request, on any of the servers, before the run ends", range=COUNT)
    timeout: float = key(300.0, "seconds without an answer after which a request has failed", range=SECONDS)
    startup_timeout: float = key(1200.0, "seconds at the start until every server must answer", range=SECONDS)


@dataclass
class TeacherConfig:
    """The model that only scores."""

    path: str | None = key(None, "an HF checkpoint directory, a hub id, or a PEFT folder, with the student's tokenizer")
    weights: str = key(
        "path",
        "path (of the model in teacher.path, or on teacher.server), or the student's own: start (as the run began), average "
        "(exponential moving average), refreshed (every refresh_every updates), present, base (without the adapters of "
        "student.lora) or adapters (with those in teacher.path instead); or recorded (its scores are in the file rollout.path)",
        choices=("path", "start", "average", "refreshed", "present", "base", "adapters", "recorded"),
    )
    decay: float = key(0.999, "average: the share that remains after an update", range=DECAY)
    refresh_every: int = key(10, "refreshed: updates between one copy of the student's weights and the next", range=COUNT)
    min_ess: float = key(
        0.1,
        "recorded: the run ends when the effective sample size of pi/mu falls below this share of the tokens; 0 is off",
        range=Range(0, 1),
    )
    prompt: TeacherPromptConfig = field(default_factory=TeacherPromptConfig)
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
    offload: bool = key(True, "keep the weights in host memory while the teacher is idle (CUDA only)")
    score_while_sampling: bool = key(
        False,
        "score complete groups while servers sample the others (rollout.vllm.placement=server); of every one of `teachers`",
    )


@dataclass
class ParallelConfig:
    """The student's layout; its data-parallel size is world / (tensor * pipeline * context)."""

    tensor: int = key(1, "ranks that split each layer", range=DEGREE)
    pipeline: int = key(1, "stages of layers", range=DEGREE)
    virtual_pipeline: int | None = key(None, "model chunks per pipeline rank", range=Range(2, 2**20))  # 1 is written as null
    context: int = key(1, "ranks that split the tokens of a micro-batch", range=DEGREE)
    expert: int = key(1, "ranks that split the experts of a mixture", range=DEGREE)
    sequence_parallel: bool = key(False, "tensor-parallel ranks also split norms and residuals, by tokens")
    recompute: str = key(
        "none",
        "activation recompute: none, selective (recompute_modules of each layer) or full (each layer)",
        choices=("none", "selective", "full"),
    )
    recompute_modules: list[str] = key(
        list(DEFAULT_RECOMPUTE), f"what selective recompute covers, of {', '.join(RECOMPUTE_MODULES)}"
    )
    offload_activations: list[str] = key(
        [],
        "parts of a layer whose activations are held in host memory until the backward pass (CUDA only), of "
        f"{', '.join(OFFLOAD_MODULES)}",
    )
    offload_min_elements: int = key(2**20, "smaller tensors stay on the device", range=COUNT_OR_OFF)
    distributed_optimizer: bool = key(True, "shard optimizer state over data-parallel ranks (adam only)")
    overlap_grad_reduce: bool = key(False, "reduce gradients during the backward pass")
    overlap_param_gather: bool = key(
        False, "gather the updated weights during the next forward pass (distributed_optimizer only)"
    )
    bucket_size: int | None = key(
        None, "with overlap, the number of weights that are reduced or gathered together; null: Megatron's choice", range=COUNT
    )


@dataclass
class ScheduleConfig:
    """A coefficient as a function of the optimizer step (docs/method.md, "Coefficients")."""

    kind: str = key(
        "constant",
        "constant, linear, cosine, switch, below, plateau or adaptive; or MODULE:NAME",
        choices=("constant", "linear", "cosine", "switch", "below", "plateau", "adaptive"),
        takes_functions=True,
    )
    init: float = key(0.0, "value at step 0", range=NOT_NEGATIVE)
    min: float = key(0.0, "floor of linear, cosine, adaptive and delta", range=NOT_NEGATIVE)
    max: float = key(1.0, "ceiling of adaptive", range=NOT_NEGATIVE)
    # With a negative delta the coefficient grows.
    delta: float = key(0.0, "subtracted per step: linear; switch, below and plateau once they have switched", range=SIGNED)
    steps: int = key(0, "cosine: length of the descent; switch: the step at which it switches", range=COUNT_OR_OFF)
    after: float = key(0.0, "switch, below and plateau: value from then on", range=NOT_NEGATIVE)
    target: float = key(0.0, "adaptive: the KL per token to hold; below: that at which it switches", range=NOT_NEGATIVE)
    drop: float = key(
        0.0, "below: the share by which the KL must fall from the first one measured, instead of target", range=DECAY
    )
    ramp: int = key(
        0,
        "below: the number of steps over which it rises linearly to init, after which it switches at the latest",
        range=COUNT_OR_OFF,
    )
    patience: int = key(3, "plateau: evaluations without a better eval/accuracy until it switches", range=COUNT)
    eta: float = key(0.1, "adaptive: gain of the controller", range=NOT_NEGATIVE)


@dataclass
class NamedTeacherConfig:
    """One of several teachers: a model in this job or on servers, and the prompts that it teaches (docs/teachers.md)."""

    path: str | None = key(None, "an HF checkpoint directory or a hub id, with the student's tokenizer")
    column: str = key(
        "domain", "the column that says whether it teaches a prompt: domain (of data.sources), or one of data.columns"
    )
    values: list[str] = key([], "the values of this column that it teaches, such as [maths]; []: every prompt")
    share: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(init=1.0))
    prompt: TeacherPromptConfig = field(default_factory=TeacherPromptConfig)
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)
    offload: bool = key(True, "keep the weights in host memory while the teacher is idle (CUDA only)")


@dataclass
class CombineConfig:
    """How reward and teacher combine into a coefficient of the policy loss and a weight of distillation, for each token
    (docs/method.md, "Combining the two signals")."""

    kind: str = key(
        "add",
        "add, gate, sign, relu, modulate, ratio or reference; or MODULE:NAME, your own function",
        choices=("add", "gate", "sign", "relu", "modulate", "ratio", "reference"),
        takes_functions=True,
    )
    signal: str = key(
        "correct",
        "sign and relu: what the teacher agrees or disagrees with: correct (the verdict) or advantage (its sign)",
        choices=("correct", "advantage"),
    )
    agree: float = key(1.8, "sign: weight of distillation where the teacher agrees", range=NOT_NEGATIVE)
    differ: float = key(1.0, "sign: weight of distillation where it does not", range=NOT_NEGATIVE)
    clip: float = key(0.2, "modulate: T / pi is clipped to [1 - clip, 1 + clip]", range=Range(0, 1))
    bounds: str = key("both", "modulate: which bounds hold, both or upper", choices=("both", "upper"))
    extrapolation: float = key(
        1.25, "reference: l of l (log T - log ref) - KL(pi, ref); above 1 it goes beyond the teacher", range=NOT_NEGATIVE
    )


@dataclass
class TokenWeightConfig:
    """A weight for each token's distillation (docs/method.md, "Which tokens are taught")."""

    kind: str = key(
        "constant",
        "constant, entropy, magnitude, prefix, rising, pass_rate, trusted_prefix or teacher_entropy; or MODULE:NAME",
        choices=(
            *("constant", "entropy", "magnitude", "prefix", "rising", "pass_rate", "trusted_prefix"),
            "teacher_entropy",
        ),
        takes_functions=True,
    )
    share: float = key(0.5, "entropy, magnitude and prefix: the share of a response's tokens that are taught", range=SHARE)
    over: str = key(
        "response",
        "entropy and magnitude: what the shares are of, the tokens of each response or all distilled ones of an update (batch)",
        choices=("response", "batch"),
    )
    more: float = key(
        0.1,
        "entropy: the share of the other tokens, those with the largest |log T - log pi|, that is taught as well",
        range=Range(0, 1),
    )
    tokens: int = key(0, "prefix: the number of tokens, instead of a share", range=COUNT_OR_OFF)
    rate: float = key(
        1.0,
        "teacher_entropy: how fast the weight falls; trusted_prefix: by how much the first token counts more than the last",
        range=POSITIVE,
    )
    low: float = key(0.25, "rising: weight of the first tokens; that of the last ones is 1", range=Range(0, 1))
    middle: float = key(0.3, "rising: where in the response it is half-way, as a share of its length", range=Range(0, 1))
    width: float = key(0.1, "rising: how wide the rise is, as a share of the length", range=POSITIVE)
    solved: float = key(1.0, "pass_rate: a of p^a (1 - p)^b, p the share of correct responses of the group", range=NOT_NEGATIVE)
    unsolved: float = key(1.0, "pass_rate: b", range=NOT_NEGATIVE)
    normalize: bool = key(False, "scale the weights so that their mean over the distilled tokens is 1")


@dataclass
class DistillationConfig:
    """The reverse KL to the teacher, on the student's own tokens."""

    estimator: str = key(
        "k2",
        "k1, k2, k3, exact, top_k or top_k_unbiased; or MODULE:NAME, of the sampled token",
        choices=("k1", "k2", "k3", "exact", "top_k", "top_k_unbiased"),
        takes_functions=True,
    )
    divergence: str = key(
        "reverse",
        "exact and top_k: reverse (KL(pi, T)), forward (KL(T, pi)) or jsd; the others: reverse",
        choices=("reverse", "forward", "jsd"),
    )
    jsd_beta: float = key(0.5, "jsd: b of b KL(T, m) + (1 - b) KL(pi, m), m = b T + (1 - b) pi", range=Range(1e-6, 1 - 1e-6))
    entry_clip: float | None = key(
        None, "exact forward: the largest value of each entry T log(T / pi) of the sum over the vocabulary", range=POSITIVE
    )
    mix: str = key(
        "none",
        "how a forward divergence is mixed with k2 of the sampled token: none, entropy (k2 everywhere, the divergence where "
        "the teacher's entropy is above mix_above), trust (k2 with the weight min(T / pi, 1), the divergence with the rest) or "
        "drawn_trust (one of the two, drawn with these probabilities); or MODULE:NAME",
        choices=("none", "entropy", "trust", "drawn_trust"),
        takes_functions=True,
    )
    mix_above: float = key(0.8, "see mix; nats", range=NOT_NEGATIVE)
    mixture: str = key(
        "geometric",
        "where several of `teachers` teach one prompt: geometric (the weighted sum of their divergences) or arithmetic (one "
        "divergence from the mean of their probabilities; k1, k2 and k3)",
        choices=("geometric", "arithmetic"),
    )
    control_variate: bool = key(
        False, "k1 and k2: subtract the expectation of log T - log pi over the vocabulary, which costs what exact does"
    )
    placement: str = key("loss", "loss, advantage or reward", choices=("loss", "advantage", "reward"))
    mask: str = key(
        "none",
        "none, response (only incorrect responses) or group (only all-incorrect groups); or MODULE:NAME",
        choices=("none", "response", "group"),
        takes_functions=True,
    )
    denominator: str = key("all", "tokens the KD loss is averaged over: all, or unmasked", choices=("all", "unmasked"))
    clamp: float | None = key(
        None, "clamp of |log T - log pi|; null: none, so that no token loses its gradient", range=POSITIVE
    )
    importance: str = key(
        "full",
        "weight pi/mu of tokens that other weights sampled: full, truncate (at most importance_bound) or mask (0 outside "
        "[1/bound, bound]); or MODULE:NAME",
        choices=("full", "truncate", "mask"),
        takes_functions=True,
    )
    importance_bound: float = key(2.0, "see importance", range=Range(1, LARGE))
    importance_level: str = key(
        "token",
        "which pi/mu: each token's, the product over the sequence, or its geometric mean (mask only, which keeps each token's)",
        choices=("token", "sequence", "geometric"),
    )
    token_weight: TokenWeightConfig = field(default_factory=TokenWeightConfig)
    stop_token: str = key(
        "auto",
        "whether the token that ends a response is distilled: keep, mask, or auto (mask if student and teacher end "
        "responses with different tokens)",
        choices=("auto", "mask", "keep"),
    )
    top_k: int = key(64, "support size of top_k and top_k_unbiased", range=COUNT)
    top_k_support: str = key("student", "whose top-k: student or teacher", choices=("student", "teacher"))
    top_k_tail: str = key(
        "bucket",
        "outside the support: truncate, renormalize, bucket, or (reverse) corrected: sum_S (p log(p/q) - p + q)",
        choices=("truncate", "renormalize", "bucket", "corrected"),
    )


@dataclass
class SamplerCorrectionConfig:
    """Correction of the GRPO term for a sampler that differs numerically from the trainer."""

    kind: str = key(
        "none",
        "none, truncate (weight min(pi_old/mu, bound)) or mask (drop tokens outside [1/bound, bound]); or MODULE:NAME",
        choices=("none", "truncate", "mask"),
        takes_functions=True,
    )
    bound: float = key(2.0, "C of truncated importance sampling", range=Range(1, LARGE))
    level: str = key(
        "token",
        "which pi_old/mu: each token's, the product over the sequence, or its geometric mean (mask only)",
        choices=("token", "sequence", "geometric"),
    )


@dataclass
class ReferenceKLConfig:
    """Optional KL to a frozen copy of the initial student."""

    coefficient: float = key(0.0, "0 is off, and no reference model is loaded", range=NOT_NEGATIVE)
    estimator: str = key("k3", "k2 or k3", choices=("k2", "k3"))


@dataclass
class ObjectiveConfig:
    """L = alpha_t * L_GRPO + beta_t * L_KD, or plain supervised fine-tuning."""

    kind: str = key("kdrl", "kdrl or sft", choices=("kdrl", "sft"))
    alpha: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(init=1.0))
    beta: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(init=0.0))
    kd: DistillationConfig = field(default_factory=DistillationConfig)
    aggregation: str = key(
        "token_mean",
        "token_mean, sequence_mean or sequence_sum_norm",
        choices=("token_mean", "sequence_mean", "sequence_sum_norm"),
    )
    combine: CombineConfig = field(default_factory=CombineConfig)
    baseline: str = key(
        "group",
        "what a reward is compared with: group (GRPO), leave_one_out (RLOO: the others of the group, not divided by a "
        "deviation) or batch (REINFORCE++: the group's mean, divided by the deviation over the batch)",
        choices=("group", "leave_one_out", "batch"),
    )
    normalize_by_std: bool = key(True, "group: divide the centred reward by the group's standard deviation")
    policy_loss: str = key(
        "clip",
        "clip (PPO's surrogate) or cispo (the clipped ratio as a constant weight of log pi); or MODULE:NAME",
        choices=("clip", "cispo"),
        takes_functions=True,
    )
    ratio: str = key(
        "token",
        "pi/pi_old of each token, the geometric mean over the sequence (GSPO), or the product over it",
        choices=("token", "sequence", "product"),
    )
    clip_against: str = key(
        "old",
        "what the ratio that is clipped divides pi by: old (pi_old, the student when the step begins; mu is left to "
        "sampler_correction) or sampler (mu, as the engine reported it; needs sampler_correction.kind=none)",
        choices=("old", "sampler"),
    )
    dual_clip: float | None = key(
        None, "clip: bound of the ratio where the advantage is negative; null: none", range=Range(1, LARGE, low_is_open=True)
    )
    entropy_bonus: float = key(0.0, "coefficient of the student's entropy, which is maximised", range=NOT_NEGATIVE)
    truncated: str = key(
        "keep",
        "responses that were cut off at their limit: keep, or drop from the policy loss (DAPO)",
        choices=("keep", "drop"),
    )
    clip_low: float = key(0.2, "the policy ratio is clipped to [1 - clip_low, 1 + clip_high]", range=Range(0, 1))
    clip_high: float = key(0.2, "see clip_low", range=NOT_NEGATIVE)
    sampler_correction: SamplerCorrectionConfig = field(default_factory=SamplerCorrectionConfig)
    reference_kl: ReferenceKLConfig = field(default_factory=ReferenceKLConfig)


@dataclass
class VllmConfig:
    """vLLM's engines, in separate processes (docs/rollout.md)."""

    placement: str = key(
        "colocated",
        "colocated (on the training ranks' GPUs, asleep while they train) or server (elsewhere)",
        choices=("colocated", "server"),
    )
    tensor: int = key(1, "GPUs that split each layer of one engine, independent of the student's layout", range=DEGREE)
    replicas: int = key(0, "engines; 0: as many as fit on the ranks' GPUs (colocated), or 1 (server)", range=Range(0, 2**20))
    servers: list[str] = key([], "host:port of running servers; their token comes in KDRL_ENGINE_TOKEN")
    gpu_memory_utilization: float | None = key(
        None, "share of each GPU for an engine; null: what training leaves, or 0.85", range=SHARE
    )
    kv_cache_gib: float = key(1.0, "KV cache of an engine on CPU", range=POSITIVE)
    startup_timeout: float = key(1200.0, "seconds until an engine must answer", range=SECONDS)
    generation_timeout: float = key(300.0, "seconds without progress after which an engine counts as hanging", range=SECONDS)
    refit_adapters: bool = key(
        False,
        "server, with student.lora: a refit sends the adapters alone, for vLLM's own LoRA support; the servers load the base "
        "from student.path",
    )
    refit_timeout: float = key(600.0, "seconds for all weights", range=SECONDS)
    refit_bucket_mib: int = key(
        256, "weights are sent in buckets of this size; sender and receiver hold two", range=Range(1, 2**20)
    )
    extra: list[str] = key(
        [],
        "further arguments of vLLM's engine (docs/rollout.md), such as ['kv_cache_dtype=fp8']; values in JSON",
    )
    restarts: int = key(3, "restarts of an engine during one batch before the run stops with a checkpoint", range=COUNT_OR_OFF)


@dataclass
class GroupFilterConfig:
    """Groups without signal, whose responses are all correct or all incorrect."""

    rounds: int = key(
        0,
        "the most further rounds of prompts_per_step prompts in a step, until that many groups have signal; 0 is off",
        range=Range(0, 1000),
    )
    others: str = key(
        "drop",
        "groups without signal: drop, or teach (they stay in the batch for distillation)",
        choices=("drop", "teach"),
    )


@dataclass
class GivenConfig:
    """Given responses in addition to the sampled ones of a step, for distillation over the vocabulary (GKD)."""

    share: float = key(
        0.0,
        "their share of a step's responses, in addition to those to prompts_per_step prompts; 0 is off",
        range=Range(0, 1, high_is_open=True),
    )
    path: str | None = key(None, "a rollout file (JSONL) with the responses; null: data.response_key of the training data")


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    engine: str = key("megatron", "megatron (the student itself), replay, or vllm", choices=("megatron", "replay", "vllm"))
    path: str | None = key(None, "replay: the rollout file (JSONL)")
    prompts_per_step: int = key(16, "P, the number of prompts", range=COUNT)
    responses_per_prompt: int = key(8, "G, the size of a group", range=COUNT)
    max_prompt_tokens: int = key(
        1024, "longer prompts are an error when the data is loaded, or dropped (data.long_prompts)", range=COUNT
    )
    max_response_tokens: int = key(64, 'a longer response is cut off (finish reason "length")', range=COUNT)
    temperature: float = key(1.0, "of sampling, and of every log-prob of student and teacher in training", range=TEMPERATURE)
    top_p: float = key(
        1.0,
        "sampler and trainer truncate pi to the likeliest tokens with this probability; 1.0 is off",
        range=SHARE,
    )
    top_k: int = key(0, "to this many of the likeliest tokens, likewise; 0 is off", range=COUNT_OR_OFF)
    min_p: float = key(
        0.0,
        "to tokens with at least this share of the likeliest one's probability, likewise; 0 is off",
        range=Range(0, 1),
    )
    stop: list[str] = key([], "a response also ends with the token that completes one of these texts")
    replay_experts: bool = key(
        False, "a mixture of experts trains with the experts that the sampler chose for each token (with vLLM on CUDA only)"
    )
    max_sequences: int = key(256, "responses one data-parallel replica (or one vLLM engine) decodes at once", range=COUNT)
    max_log_prob_drift: float | None = key(
        None, "largest |sampler - trainer| log-prob that counts as rounding; null: by model.dtype", range=POSITIVE
    )
    steps_ahead: int = key(
        0,
        "how many steps ahead responses are sampled during training (rollout.vllm.placement=server); 0 is off",
        range=Range(0, 1000),
    )
    max_age: int | None = key(
        None,
        "most steps between the weights that sampled a token and its training; null: steps_ahead, in the order of the prompts; "
        "a larger value lets complete groups overtake others",
        range=COUNT,
    )
    unfinished: str = key(
        "wait",
        "responses that are not finished at a refit: wait for them, or continue them with the new weights and keep, or "
        "recompute, their KV cache",
        choices=("wait", "keep", "recompute"),
    )
    partial_tokens: int | None = key(
        None,
        "tokens of a response that are sampled at a time, before the step trains; unfinished responses continue in the next "
        "step. The prompts of steps_ahead further steps are sampled too, by any engine. null: whole responses",
        range=COUNT,
    )
    max_continuations: int | None = key(
        None,
        "most continuations of a response with partial_tokens; the last one completes it. null: no limit",
        range=COUNT_OR_OFF,
    )
    group_filter: GroupFilterConfig = field(default_factory=GroupFilterConfig)
    given: GivenConfig = field(default_factory=GivenConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass
class RewardTermConfig:
    """A reward added to the verifier's: `weight` times the score of a registered kind."""

    kind: str = key("format", "any kind of reward.kind, or format")
    weight: float = key(
        1.0, "factor of its score, which lies between 0 and 1 (a reward model's own scale may differ)", range=SIGNED
    )


@dataclass
class RemoteRewardConfig:
    """`remote_model`: a reward model that is reached over HTTP (docs/rewards.md has the protocol)."""

    url: str | None = key(None, "where responses are posted as JSON")
    token_variable: str | None = key(None, "environment variable with the bearer token; null: none is sent")
    timeout: float = key(60.0, "seconds for one request", range=SECONDS)
    attempts: int = key(5, "tries of one request before the run stops with an error", range=COUNT)
    batch_size: int = key(64, "responses in one request", range=COUNT)


@dataclass
class LocalRewardConfig:
    """`local_model`: a reward model that each data-parallel replica loads for itself."""

    path: str | None = key(None, "an HF sequence-classification directory with one label and safetensors weights")
    dtype: str = key("float32", "float32 or bfloat16", choices=("float32", "bfloat16"))
    batch_size: int = key(8, "texts of one forward pass", range=COUNT)


@dataclass
class RewardConfig:
    """The verifier, which decides what is correct, and further rewards that are added to its reward."""

    kind: str = key("math_verify", "the verifier: a registered kind (docs/rewards.md), or MODULE:NAME, your own")
    extract: str = key(
        "boxed",
        r"math_verify: boxed (nothing but a \\boxed{} is an answer) or anywhere (for base models)",
        choices=("boxed", "anywhere"),
    )
    correct: float = key(1.0, "reward of a correct response", range=SIGNED)
    incorrect: float = key(
        0.0, "reward of an incorrect one; a score between 0 and 1 gives a reward between the two", range=SIGNED
    )
    threshold: float = key(
        1.0,
        "a response is correct if the verifier's score reaches this value, whatever its other rewards",
        range=SIGNED,  # reward models have their own scales
    )
    accept_truncated: bool = key(
        True, "whether a response that was cut off at its limit may be correct; false gives it the score 0"
    )
    format_bonus: float = key(
        0.0, r"added when the response ends properly and holds exactly one \\boxed{} answer", range=SIGNED
    )
    terms: list[RewardTermConfig] = key([], "further rewards, such as [{kind: format, weight: 0.1}]")
    timeout: float = key(
        5.0,
        "seconds for one answer; a verifier that needs longer is killed, and the response gets the score 0 and is counted",
        range=SECONDS,
    )
    workers: int = key(2, "verifier processes per data-parallel replica", range=Range(1, 2**16))
    remote: RemoteRewardConfig = field(default_factory=RemoteRewardConfig)
    local: LocalRewardConfig = field(default_factory=LocalRewardConfig)


@dataclass
class SourceConfig:
    """One of several training sets (domains). Null values are taken from `data`."""

    path: str | None = key(None, "a JSONL or parquet file, or a hub id; null with `dataset`: that one's")
    dataset: str | None = key(None, "a name of conf/dataset, such as gsm8k, which sets the columns and the verifier")
    name: str | None = key(None, "name of the domain in metrics and rollout files; null: the file's")
    weight: float = key(1.0, "its share of the prompts of a step is weight / sum of weights", range=POSITIVE)
    reward: str | None = key(None, "kind of its verifier; null: reward.kind")
    eval: str | None = key(None, "held-out prompts of this domain, evaluated by its name with its columns and verifier")
    split: str | None = key(None, "for a hub id")
    subset: str | None = key(None, "for a hub id of several subsets")
    prompt_key: str | None = key(None, "see data.prompt_key, and so on")
    answer_key: str | None = key(None, "see data")
    context_key: str | None = key(None, "see data")
    choices_key: str | None = key(None, "see data")
    response_key: str | None = key(None, "see data")
    prompt_pattern: str | None = key(None, "see data")


@dataclass
class DataConfig:
    """Prompts: JSONL or parquet files, or a hub id, with a prompt and an answer per row. `prompt=NAME` sets the templates."""

    train: str | None = key(None, "prompts to train on: a JSONL or parquet file (.gz too), or a hub id")
    sources: list[SourceConfig] = key([], "instead of train: several, with a weight and a verifier each")
    eval: str | None = key(None, "held-out prompts, likewise")
    split: str = key("train", "for a hub id")
    subset: str | None = key(None, 'for a hub id of several subsets (its "configuration")')
    prompt_key: str = key("prompt", "column of the problem: a text, or chat messages; a.b is b in the column a")
    answer_key: str = key("answer", "column of the reference answer")
    context_key: str | None = key(None, "column of a text that comes before the problem, if it is not empty")
    choices_key: str | None = key(
        None, "column of a list of choices, shown as A, B, ...; the answer is the number (from 0) or the text of one"
    )
    response_key: str = key("response", "sft and rollout.given: the given response")
    columns: list[str] = key([], "further columns that rewards receive (docs/rewards.md)")
    prompt_pattern: str | None = key(
        None, "regular expression with one group, the problem, if the column contains more than the problem"
    )
    long_prompts: str = key(
        "refuse",
        "training prompts over rollout.max_prompt_tokens: refuse (an error) or drop (counted)",
        choices=("refuse", "drop"),
    )
    template: str = key("chat", "chat (the tokenizer's chat template) or plain (`plain_template`)", choices=("chat", "plain"))
    plain_template: str = key("{prompt}", "plain: the text around the problem; @FILE reads it from a file")
    message_template: str = key("{prompt}", "chat: the user's message around the problem; or @FILE")
    system_prompt: str | None = key(None, "chat: the system prompt; or @FILE")
    template_arguments: list[str] = key(
        [], "chat: further variables of the template, such as [enable_thinking=false]; in evaluation too"
    )
    chat_date: str = key("2024-07-26", "the date passed to chat templates that ask for today's, so that prompts stay the same")
    shuffle: bool = key(True, "a new order in each epoch, a function of the seed")


@dataclass
class EvalConfig:
    """Evaluation on held-out prompts: `data.eval` and named benchmarks."""

    every: int = key(0, "steps between evaluations; 0 evaluates only at the end, -1 never", range=EVERY)
    at_start: bool = key(False, "also before the first step")
    benchmarks: list[str] = key([], "names of conf/benchmark, such as [aime24, math_500]")
    samples: int = key(1, "k of avg@k", range=COUNT)
    greedy: bool = key(True, "also report greedy accuracy")
    temperature: float = key(1.0, "of the sampled responses", range=Range(1e-3, 1e3, also=(0,)))
    top_p: float | None = key(None, "of the sampled responses; null: rollout.top_p", range=SHARE)
    top_k: int | None = key(None, "likewise; null: rollout.top_k", range=COUNT_OR_OFF)
    min_p: float | None = key(None, "likewise; null: rollout.min_p", range=Range(0, 1))
    stop: list[str] | None = key(None, "of all responses, also greedy ones; null: rollout.stop")
    max_response_tokens: int | None = key(None, "likewise; null: rollout.max_response_tokens", range=COUNT)
    max_prompts: int = key(0, "the most prompts of each benchmark; 0: all", range=COUNT_OR_OFF)
    block: int = key(
        0, "prompts sampled at a time, after which an interrupted kdrl-evaluate can resume; 0: all", range=COUNT_OR_OFF
    )


@dataclass
class BenchmarkConfig:
    """A set of problems to evaluate on: one file of conf/benchmark."""

    source: str = key(MISSING, "a JSONL or parquet file, or a hub id")
    subset: str | None = key(None, "of a hub id of several subsets")
    split: str = key("test", "of a hub id")
    prompt_key: str = key("problem", "column of the problem")
    answer_key: str = key("answer", "column of the reference answer")
    context_key: str | None = key(None, "column of a text that comes before the problem, if it is not empty")
    choices_key: str | None = key(None, "column of a list of choices")
    prompt_pattern: str | None = key(None, "regular expression with one group, the problem")
    reward: str | None = key(None, "kind of the verifier; null: the run's")


@dataclass
class BatchConfig:
    """How a rollout batch becomes optimizer updates."""

    micro_tokens: int = key(8192, "most tokens (prompt + response) in one micro-batch of one rank", range=Range(1, 2**63 - 1))
    updates_per_step: int = key(1, "optimizer updates per batch; 1 is the paper's strictly on-policy setting", range=COUNT)
    share_prompts: bool = key(
        False, "compute a prompt once for all responses to it in a micro-batch, in training and in scoring"
    )


@dataclass
class OptimizerConfig:
    """The student's optimizer."""

    name: str = key("adam", "adam (AdamW) or sgd (no momentum)", choices=("adam", "sgd"))
    lr: float = key(1e-6, "peak learning rate", range=NOT_NEGATIVE)
    schedule: str = key(
        "constant", "of the learning rate: constant, linear or cosine", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = key(0, "linear warm-up of the learning rate", range=COUNT_OR_OFF)
    min_lr: float = key(0.0, "value of linear and cosine at the run's last update", range=NOT_NEGATIVE)
    weight_decay: float = key(0.0, "decoupled (AdamW), of matrices only: not of norms and biases", range=NOT_NEGATIVE)
    clip_grad: float = key(1.0, "global gradient norm; 0 is off", range=NOT_NEGATIVE)
    adam_beta1: float = key(0.9, "decay of the first moment", range=DECAY)
    adam_beta2: float = key(0.95, "decay of the second moment", range=DECAY)
    adam_eps: float = key(
        1e-8,
        "added to the root of the second moment",
        range=Range(1e-30, 1),  # below 1e-38 float32 has only 0, which would divide by 0
    )
    offload: bool = key(False, "keep the state in host memory between updates (CUDA only)")


@dataclass
class CheckpointConfig:
    """Training checkpoints and the final export."""

    every: int = key(0, "steps between checkpoints; 0 saves at the end and by time only, -1 never", range=EVERY)
    every_minutes: float = key(
        30.0,
        "minutes after which a step is saved too, counted from the beginning of the last checkpoint; 0 is off",
        range=Range(0, YEAR / 60),
    )
    resume: str = key("auto", "auto (the run's latest), never, or a checkpoint path")
    keep: int = key(2, "newest checkpoints kept; 0 keeps all", range=COUNT_OR_OFF)
    best: str | None = key(
        None,
        "a metric of evaluations, such as eval/accuracy: the checkpoint with its highest value is kept as checkpoints/best",
    )
    asynchronous: bool = key(True, "child processes write while training continues; false waits for each checkpoint")
    export_hf: bool = key(True, "write the final student as an HF checkpoint in RUN/hf")


@dataclass
class LoggingConfig:
    """What the run displays and stores."""

    progress: bool = key(True, "live display on rank 0")
    tensorboard: bool | None = key(None, "true adds tensorboard to the loggers, false leaves it out; null changes nothing")
    loggers: list[str] = key(["tensorboard"], "also wandb, mlflow, trackio, or MODULE:NAME")
    project: str = key("kdrl", "the project, in loggers that have projects (MLflow's experiment)")
    run_name: str | None = key(None, "the run's name in loggers; null: its folder below runs/, or the name of run.dir")
    rollouts: bool = key(True, "write rollouts/step_*.jsonl")
    gradient_split_every: int = key(
        0, "updates between measurements of both gradients' norms and cosine (two more backward passes)", range=COUNT_OR_OFF
    )


@dataclass
class FaultConfig:
    """An injected fault, to test recovery."""

    kind: str = key(
        "none",
        "none, fail (raise), hang, slow, kill, stop (SIGTERM), full_disk, out_of_memory or nan (output, weight)",
        choices=("none", "fail", "hang", "slow", "kill", "stop", "full_disk", "out_of_memory", "nan"),
    )
    rank: int = key(0, "the rank it strikes", range=COUNT_OR_OFF)
    step: int = key(1, "the step in which it strikes; slow lasts from this step on", range=COUNT_OR_OFF)
    phase: str = key(
        "train",
        'the phase at whose beginning it strikes; "load student" is in step 0, update after the optimizer\'s step',
        choices=(
            "load student",
            "refit",
            "rollout",
            "reward",
            "teacher",
            "train",
            "logging",
            "evaluation",
            "checkpoint",
            "update",
        ),
    )
    seconds: float = key(1.0, "slow: added to each such phase", range=Range(0, YEAR))


@dataclass
class ClusterConfig:
    """The cluster, for launch scripts and planning; training itself takes the number of ranks from torchrun."""

    nodes: int = key(1, "machines that train", range=DEGREE)
    gpus_per_node: int = key(8, "ranks on each", range=DEGREE)
    server_nodes: int = key(
        0, "further machines of the same job, filled with servers for rollout=vllm (slurm/serve.sh)", range=Range(0, 2**20)
    )
    teacher_nodes: int = key(
        0, "further machines of the same job, filled with servers of teachers (teacher.server)", range=Range(0, 2**20)
    )
    name: str = key("", "name of the GPU; cluster=h100, h200, b200 or a100 sets this and everything below, for kdrl-plan")
    memory_gib: float = key(0.0, "memory of one GPU, GiB", range=RATE)
    peak_tflops: float = key(0.0, "peak of dense bfloat16 matrix products, TFLOP/s of one GPU", range=RATE)
    fp8_peak_tflops: float = key(0.0, "the same in FP8; 0 where there is none", range=RATE)
    memory_gbs: float = key(0.0, "memory bandwidth of one GPU, GB/s", range=RATE)
    node_gbs: float = key(0.0, "bandwidth between GPUs of a node, GB/s of one GPU in one direction", range=RATE)
    network_gbs: float = key(0.0, "bandwidth between nodes, GB/s of one GPU in one direction", range=RATE)
    host_gbs: float = key(0.0, "bandwidth between one GPU and host memory, GB/s in one direction", range=RATE)
    storage_gbs: float = key(0.0, "write bandwidth of one node to the file system, GB/s", range=RATE)
    usd_per_gpu_hour: float = key(0.0, "price of one GPU for one hour, USD", range=RATE)


@dataclass
class Config:
    """The whole configuration, one field per group."""

    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, NamedTeacherConfig] = key({}, "instead of teacher.path: several, each by a name of your choice")
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


ConfigStore.instance().store(name="schema", node=Config)


LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""The loggers that write metrics besides metrics.jsonl; `MODULE:NAME` names any other."""

REWARD_KINDS = ("math_verify", "exact_match", "multiple_choice", "python_code", "format", "remote_model", "local_model")
"""The registered rewards; `MODULE:NAME` names any other."""

OWN_SCALES = ("remote_model", "local_model")
"""Rewards whose scores may be any number; all other scores are between 0 and 1."""

"""Every key, its meaning, and the ONE place where its default lives."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class RunConfig:
    """Where the run lives on disk."""

    dir: str = "runs/default"  # the run directory: config, metrics, rollouts, checkpoints, final export


@dataclass
class ProfileConfig:
    """Traces of single steps, for torch's profiler viewers (docs/operations.md)."""

    steps: list[int] = field(default_factory=list)  # steps to trace, such as [3,4]; a trace of a large step takes gigabytes
    ranks: list[int] = field(default_factory=lambda: [0])  # ranks that write one, in RUN/profile


@dataclass
class TrainerConfig:
    """Length and reproducibility of the run."""

    steps: int = 100  # training steps (one rollout batch each); 0 only evaluates
    seed: int = 1  # keys data order, sampling and evaluation: every draw is a function of (seed, step, sample)
    self_test: bool = True  # seconds at the start: sampler and trainer agree, and the vocabulary-parallel sums are right
    deterministic: bool = False  # deterministic kernels: the same run gives the same bits
    max_bad_updates: int = 3  # abort after this many updates in a row skipped for NaN or Inf
    distributed_timeout_minutes: int = 30  # a collective that hangs longer ends the job
    hang_timeout: float = 1200.0  # seconds without progress on any rank after which the job ends, naming who hangs; 0 is off
    slow_ranks_every: int = 10  # steps between comparisons of the ranks' own work, which name a slow one; 0 is off
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass
class ModelConfig:
    """How Megatron-Core models are built, student and teacher alike."""

    dtype: str = "float32"  # float32 or bfloat16
    spec: str = "auto"  # auto (Transformer Engine, where it imports, for bfloat16 on CUDA; or local), local, transformer_engine


@dataclass
class StudentConfig:
    """The model that learns."""

    path: str | None = None  # an HF checkpoint directory


@dataclass
class TeacherParallelConfig:
    """The teacher's own layout over the same ranks; its data-parallel size is what is left over."""

    tensor: int = 1  # ranks that split each of its layers
    pipeline: int = 1  # stages of its layers
    expert: int = 1  # ranks that split its experts


@dataclass
class TeacherConfig:
    """The model that only scores."""

    path: str | None = None  # an HF checkpoint directory with the student's tokenizer
    parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    offload: bool = True  # keep the weights in host memory while the teacher is idle (CUDA only)
    score_while_sampling: bool = False  # score complete groups while servers sample the others (rollout.vllm.placement=server)


@dataclass
class ParallelConfig:
    """The student's layout; its data-parallel size is world / (tensor * pipeline * context)."""

    tensor: int = 1  # ranks that split each layer
    pipeline: int = 1  # stages of layers
    virtual_pipeline: int | None = None  # model chunks per pipeline rank
    context: int = 1  # ranks that split the tokens of a micro-batch
    expert: int = 1  # ranks that split the experts of a mixture
    sequence_parallel: bool = False  # tensor-parallel ranks also split norms and residuals, by tokens
    recompute: str = "none"  # activation recompute: none or full (each layer)
    distributed_optimizer: bool = True  # shard optimizer state over data-parallel ranks (adam only)
    overlap_grad_reduce: bool = False  # reduce gradients while the backward pass goes on
    overlap_param_gather: bool = False  # gather the updated weights while the next pass goes on (distributed_optimizer only)
    bucket_size: int | None = None  # weights that are reduced or gathered together where overlapped; null: Megatron's choice


@dataclass
class ScheduleConfig:
    """A coefficient as a function of the optimizer step (METHOD: coefficient schedules)."""

    kind: str = "constant"  # constant, linear, cosine, switch or adaptive
    init: float = 0.0  # value at step 0
    min: float = 0.0  # floor of linear, cosine and adaptive
    max: float = 1.0  # ceiling of adaptive
    delta: float = 0.0  # linear: subtracted per step
    steps: int = 0  # cosine: length of the descent; switch: the step at which it switches
    after: float = 0.0  # switch: value from that step on
    target: float = 0.0  # adaptive: the KL per token to hold
    eta: float = 0.1  # adaptive: gain of the controller


@dataclass
class DistillationConfig:
    """The reverse KL to the teacher, on the student's own tokens."""

    estimator: str = "k2"  # k1, k2, k3, exact, top_k or top_k_unbiased
    placement: str = "loss"  # loss, advantage or reward
    mask: str = "none"  # none, response (only incorrect responses) or group (only all-incorrect groups)
    denominator: str = "all"  # tokens the KD loss is averaged over: all, or unmasked
    clamp: float | None = None  # clamp of |log T - log pi|; None leaves every gradient alive
    top_k: int = 64  # support size of top_k and top_k_unbiased
    top_k_support: str = "student"  # whose top-k: student or teacher
    top_k_tail: str = "bucket"  # outside the support: truncate, renormalize or bucket


@dataclass
class SamplerCorrectionConfig:
    """Correction of the GRPO term for a sampler that differs numerically from the trainer."""

    kind: str = "none"  # none, truncate (weight min(pi_old/mu, bound)) or mask (drop tokens outside [1/bound, bound])
    bound: float = 2.0  # C of truncated importance sampling


@dataclass
class ReferenceKLConfig:
    """Optional KL to a frozen copy of the initial student."""

    coefficient: float = 0.0  # 0 is off, and no reference model is loaded
    estimator: str = "k3"  # k2 or k3


@dataclass
class ObjectiveConfig:
    """L = alpha_t * L_GRPO + beta_t * L_KD, or plain supervised fine-tuning."""

    kind: str = "kdrl"  # kdrl or sft
    alpha: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(init=1.0))
    beta: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(init=0.0))
    kd: DistillationConfig = field(default_factory=DistillationConfig)
    aggregation: str = "token_mean"  # token_mean, sequence_mean or sequence_sum_norm
    normalize_by_std: bool = True  # divide the group-centred reward by the group's standard deviation
    clip_low: float = 0.2  # the policy ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2  # see clip_low
    sampler_correction: SamplerCorrectionConfig = field(default_factory=SamplerCorrectionConfig)
    reference_kl: ReferenceKLConfig = field(default_factory=ReferenceKLConfig)


@dataclass
class VllmConfig:
    """vLLM's engines, in processes of their own (docs/rollout.md)."""

    placement: str = "colocated"  # colocated (on the training ranks' GPUs, asleep while they train) or server (elsewhere)
    tensor: int = 1  # GPUs that split each layer of one engine, independent of the student's layout
    replicas: int = 0  # engines; 0 takes as many as the ranks' GPUs hold (colocated) or 1 (server)
    servers: list[str] = field(default_factory=list)  # host:port of running servers; their token comes in KDRL_ENGINE_TOKEN
    gpu_memory_utilization: float | None = None  # share of each GPU for an engine; None takes what training leaves, or 0.85
    kv_cache_gib: float = 1.0  # KV cache of an engine on CPU
    startup_timeout: float = 1200.0  # seconds until an engine must answer
    generation_timeout: float = 300.0  # seconds without a sign of progress after which an engine hangs
    refit_timeout: float = 600.0  # seconds for all weights
    refit_bucket_mib: int = 256  # weights travel in buckets of this size; sender and receiver hold two
    restarts: int = 3  # of an engine during one batch, before the run stops with a checkpoint


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    engine: str = "megatron"  # megatron (the student itself), replay, or vllm
    path: str | None = None  # replay: the rollout file (JSONL)
    prompts_per_step: int = 16  # P
    responses_per_prompt: int = 8  # G, the size of a group
    max_prompt_tokens: int = 1024  # longer prompts are an error when the data is loaded
    max_response_tokens: int = 64  # a longer response is cut off (finish reason "length")
    temperature: float = 1.0  # of sampling, and of every log-prob of student and teacher in training
    top_p: float = 1.0  # 1.0 is off; the log-probs are then those of the truncated distribution
    max_sequences: int = 256  # responses one data-parallel replica (or one vLLM engine) decodes at once
    max_log_prob_drift: float | None = None  # largest |sampler - trainer| log-prob that is rounding; None goes by model.dtype
    steps_ahead: int = 0  # 1 samples the next step's responses while this one's are trained on (rollout.vllm.placement=server)
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass
class RewardTermConfig:
    """One more reward beside the verifier's: `weight` times the score of a registered kind."""

    kind: str = "format"  # any kind of reward.kind, or format
    weight: float = 1.0  # factor of its score, which lies between 0 and 1 (a reward model's own scale may differ)


@dataclass
class RemoteRewardConfig:
    """`remote_model`: a reward model behind HTTP (docs/rewards.md has the protocol)."""

    url: str | None = None  # where responses are posted as JSON
    token_variable: str | None = None  # environment variable with the bearer token; None sends none
    timeout: float = 60.0  # seconds for one request
    attempts: int = 5  # tries of one request before the run stops with an error
    batch_size: int = 64  # responses in one request


@dataclass
class LocalRewardConfig:
    """`local_model`: a reward model that each data-parallel replica loads for itself."""

    path: str | None = None  # an HF sequence-classification directory with one label and safetensors weights
    dtype: str = "float32"  # float32 or bfloat16
    batch_size: int = 8  # texts of one forward pass


@dataclass
class RewardConfig:
    """The verifier, which decides what is correct, and further rewards that are added to its own."""

    kind: str = "math_verify"  # the verifier: a registered kind (docs/rewards.md), or MODULE:NAME for one of your own
    extract: str = "boxed"  # math_verify: boxed (nothing but a \\boxed{} is an answer) or anywhere (for base models)
    correct: float = 1.0  # reward of a correct response
    incorrect: float = 0.0  # reward of an incorrect one; a score between 0 and 1 gives a reward between the two
    threshold: float = 1.0  # a response is correct where the verifier's score reaches this; other rewards play no part
    format_bonus: float = 0.0  # added when the response ends properly and holds exactly one \\boxed{} answer
    terms: list[RewardTermConfig] = field(default_factory=list)  # further rewards, such as [{kind: format, weight: 0.1}]
    timeout: float = 5.0  # seconds for one answer; a verifier that takes longer is killed and the answer is incorrect
    workers: int = 2  # verifier processes per data-parallel replica
    remote: RemoteRewardConfig = field(default_factory=RemoteRewardConfig)
    local: LocalRewardConfig = field(default_factory=LocalRewardConfig)


@dataclass
class DataConfig:
    """Prompts: JSONL or parquet files, or a hub id, with a prompt and an answer per row. `prompt=NAME` sets the templates."""

    train: str | None = None  # prompts to train on: a JSONL or parquet file, or a hub id
    eval: str | None = None  # held-out prompts, likewise
    split: str = "train"  # for a hub id
    subset: str | None = None  # for a hub id of several subsets (its "configuration")
    prompt_key: str = "prompt"  # column of the problem
    answer_key: str = "answer"  # column of the reference answer
    context_key: str | None = None  # column of a text that stands before the problem where it is not empty
    response_key: str = "response"  # sft: the given response
    template: str = "chat"  # chat (the tokenizer's chat template) or plain (`plain_template`)
    plain_template: str = "{prompt}"  # plain: where the problem stands in the text
    message_template: str = "{prompt}"  # chat: where the problem stands in the user's message
    system_prompt: str | None = None  # chat template only
    shuffle: bool = True  # a new order in each epoch, a function of the seed


@dataclass
class EvalConfig:
    """Evaluation on held-out prompts: those of `data.eval`, and named benchmarks."""

    every: int = 0  # steps between evaluations; 0 evaluates only at the end, -1 never
    at_start: bool = False  # also before the first step
    benchmarks: list[str] = field(default_factory=list)  # names of conf/benchmark, such as [aime24, math_500]
    samples: int = 1  # k of avg@k
    greedy: bool = True  # also report greedy accuracy
    temperature: float = 1.0  # of the sampled responses
    max_prompts: int = 0  # of each benchmark; 0 takes all
    block: int = 0  # prompts sampled in one go, the unit that an interrupted tools/evaluate.py goes on from; 0 takes all


@dataclass
class BenchmarkConfig:
    """A set of problems to evaluate on: one file of conf/benchmark."""

    source: str = MISSING  # a JSONL or parquet file, or a hub id
    subset: str | None = None  # of a hub id of several subsets
    split: str = "test"  # of a hub id
    prompt_key: str = "problem"  # column of the problem
    answer_key: str = "answer"  # column of the reference answer
    context_key: str | None = None  # column of a text that stands before the problem where it is not empty
    reward: str | None = None  # kind of the verifier; None takes the run's


@dataclass
class BatchConfig:
    """How a rollout batch becomes optimizer updates."""

    micro_tokens: int = 8192  # most tokens (prompt + response) in one micro-batch of one rank
    updates_per_step: int = 1  # optimizer updates per rollout batch; 1 is the paper's strictly on-policy setting


@dataclass
class OptimizerConfig:
    """The student's optimizer."""

    name: str = "adam"  # adam (AdamW) or sgd (no momentum)
    lr: float = 1e-6  # peak learning rate
    schedule: str = "constant"  # of the learning rate: constant, linear or cosine
    warmup_steps: int = 0  # linear warm-up of the learning rate
    min_lr: float = 0.0  # where linear and cosine end
    weight_decay: float = 0.0  # decoupled (AdamW), of matrices only: not of norms and biases
    clip_grad: float = 1.0  # global gradient norm; 0 is off
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_eps: float = 1e-8  # added to the root of the second moment
    offload: bool = False  # keep the state in host memory between updates (CUDA only)


@dataclass
class CheckpointConfig:
    """Training checkpoints and the final export."""

    every: int = 0  # steps between checkpoints; 0 saves only at the end, -1 never
    resume: str = "auto"  # auto (the run's latest), never, or a checkpoint path
    keep: int = 2  # newest checkpoints kept; 0 keeps all
    asynchronous: bool = True  # child processes write while training goes on; false waits for each checkpoint
    export_hf: bool = True  # write the final student as an HF checkpoint in RUN/hf


@dataclass
class LoggingConfig:
    """What the run shows and keeps."""

    progress: bool = True  # live display on rank 0
    tensorboard: bool = True  # write tensorboard/ beside metrics.jsonl
    rollouts: bool = True  # write rollouts/step_*.jsonl
    gradient_split_every: int = 0  # updates between looks at both gradients' norms and cosine (two more backward passes)


@dataclass
class FaultConfig:
    """A fault on purpose, to test what a run survives."""

    kind: str = "none"  # none, fail (raise), hang, slow, kill, stop (SIGTERM), full_disk, out_of_memory or nan (output)
    rank: int = 0  # the rank it strikes
    step: int = 1  # the step in which it strikes; slow goes on from there
    phase: str = "train"  # at whose beginning: rollout, reward, ...; "load student" is in step 0
    seconds: float = 1.0  # slow: added to each such phase


@dataclass
class ClusterConfig:
    """The machine, for launch scripts and planning; training itself takes its size from torchrun."""

    nodes: int = 1  # machines that train
    gpus_per_node: int = 8  # ranks on each
    server_nodes: int = 0  # further machines of the same job, filled with servers for rollout=vllm (slurm/serve.sh)
    name: str = ""  # of the GPU; cluster=h100, h200, b200 or a100 sets this and everything below, for tools/plan.py
    memory_gib: float = 0.0  # memory of one GPU, GiB
    peak_tflops: float = 0.0  # dense bfloat16 matrix products, TFLOP/s of one GPU
    fp8_peak_tflops: float = 0.0  # the same in FP8; 0 where there is none
    memory_gbs: float = 0.0  # memory bandwidth of one GPU, GB/s
    node_gbs: float = 0.0  # between GPUs of a node, GB/s of one GPU in one direction
    network_gbs: float = 0.0  # between nodes, GB/s of one GPU in one direction
    host_gbs: float = 0.0  # between one GPU and host memory, GB/s in one direction
    storage_gbs: float = 0.0  # one node's writes to the file system, GB/s
    usd_per_gpu_hour: float = 0.0  # price of one GPU for one hour, USD


@dataclass
class Config:
    """The whole configuration, one field per group."""

    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
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


CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.spec": ("auto", "local", "transformer_engine"),
    "parallel.recompute": ("none", "full"),
    "objective.kind": ("kdrl", "sft"),
    "reward.extract": ("boxed", "anywhere"),
    "objective.aggregation": ("token_mean", "sequence_mean", "sequence_sum_norm"),
    "objective.alpha.kind": ("constant", "linear", "cosine", "switch", "adaptive"),
    "objective.beta.kind": ("constant", "linear", "cosine", "switch", "adaptive"),
    "objective.kd.estimator": ("k1", "k2", "k3", "exact", "top_k", "top_k_unbiased"),
    "objective.kd.placement": ("loss", "advantage", "reward"),
    "objective.kd.mask": ("none", "response", "group"),
    "objective.kd.denominator": ("all", "unmasked"),
    "objective.kd.top_k_support": ("student", "teacher"),
    "objective.kd.top_k_tail": ("truncate", "renormalize", "bucket"),
    "objective.sampler_correction.kind": ("none", "truncate", "mask"),
    "objective.reference_kl.estimator": ("k2", "k3"),
    "rollout.engine": ("megatron", "replay", "vllm"),
    "reward.local.dtype": ("float32", "bfloat16"),
    "rollout.vllm.placement": ("colocated", "server"),
    "data.template": ("chat", "plain"),
    "optimizer.name": ("adam", "sgd"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "fault.kind": ("none", "fail", "hang", "slow", "kill", "stop", "full_disk", "out_of_memory", "nan"),
    "fault.phase": ("load student", "refit", "rollout", "reward", "teacher", "train", "logging", "evaluation", "checkpoint"),
}
"""The allowed values of every key that is a choice."""

REWARD_KINDS = ("math_verify", "exact_match", "multiple_choice", "python_code", "format", "remote_model", "local_model")
"""The registered rewards; `MODULE:NAME` names any other."""

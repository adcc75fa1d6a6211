"""Step times that others have published, and the planner's estimates for the same runs."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_mcore.config import load_config
from kdrl_mcore.config.derived import is_supervised
from kdrl_mcore.planning.plan import Plan, make_plan
from kdrl_mcore.planning.setup import Choices, make_setup
from kdrl_mcore.planning.workload import workload_of

_GRPO = (
    "objective=grpo model.dtype=bfloat16 cluster=h100 rollout.engine=vllm rollout.prompts_per_step=64 "
    "rollout.responses_per_prompt=32 rollout.max_response_tokens=3968 batch.updates_per_step=4 batch.micro_tokens=4096 "
    "objective.reference_kl.coefficient=0.01 parallel.overlap_grad_reduce=true reward.workers=8"
)
"""NeMo-RL 0.5's performance recipes: 2048 samples in four updates, so old policy and reference are scored; sequences are packed
to 4096 tokens."""
_COLOCATED = "rollout.vllm.gpu_memory_utilization=0.6"
_SERVERS = (
    "rollout.vllm.placement=server rollout.vllm.gpu_memory_utilization=0.8 rollout.steps_ahead=1 "
    "objective.sampler_correction.kind=truncate"
)
_QWEN = (
    "student.path=Qwen3-32B parallel.tensor=4 parallel.pipeline=4 parallel.sequence_parallel=true rollout.vllm.tensor=4 "
    "cluster.nodes=4"
)
_LLAMA_8B = "student.path=Llama-3.1-8B-Instruct parallel.recompute=full"
_PRETRAINING = (
    "objective=sft model.dtype=bfloat16 student.path=DeepSeek-R1-Distill-Llama-70B cluster=h100 cluster.nodes=8 "
    "parallel.tensor=4 parallel.pipeline=8 parallel.virtual_pipeline=5 parallel.sequence_parallel=true batch.micro_tokens=8192 "
    "rollout.responses_per_prompt=1 rollout.max_response_tokens=8192 parallel.overlap_grad_reduce=true"
)
PROMPT = 128
"""The mean number of prompt tokens, an assumption: the published lengths are those of whole sequences."""
NEMO_RL = "https://docs.nvidia.com/nemo/rl/0.5.0/about/performance-summary.html"
MEGATRON_BRIDGE = "https://docs.nvidia.com/nemo/megatron-bridge/latest/performance-summary-archive.html"


@dataclass(frozen=True)
class Published:
    """One published run.

    Attributes:
        overrides: the run in this project's configuration.
        tokens: the mean length of a sequence.
        value: seconds per step, or tokens per second and GPU, by `unit`.
        source: where it was published.
    """

    name: str
    overrides: str
    tokens: int
    unit: str
    value: float
    source: str
    choices: Choices

    def plan(self) -> Plan:
        """The plan of the run."""
        config = load_config(self.overrides.split())
        prompt = 0 if is_supervised(config.objective) else PROMPT
        workload = workload_of(config, prompt_tokens=prompt, response_tokens=self.tokens - prompt)
        return make_plan(make_setup(config, workload, self.choices))

    def planned(self) -> float:
        """The planned value, in the published unit."""
        plan = self.plan()
        return plan.seconds if self.unit == "s" else plan.tokens_per_gpu_second


_NEMO = Choices(sorted_by_length=False, fused_head=False)
_FP8 = Choices(fp8=True, overlap_tensor=True)
RUNS = (
    Published("Qwen3-32B GRPO, 32 GPUs", f"{_GRPO} {_QWEN} {_COLOCATED}", 3251, "s", 376, NEMO_RL, _NEMO),
    Published(
        "the same, one step off-policy, 32+32",
        f"{_GRPO} {_QWEN} {_SERVERS} rollout.vllm.replicas=8",
        3252,
        "s",
        200,
        NEMO_RL,
        _NEMO,
    ),
    Published(
        "Llama-3.1-8B GRPO, 16 GPUs",
        f"{_GRPO} {_LLAMA_8B} parallel.pipeline=2 cluster.nodes=2 {_COLOCATED}",
        1019,
        "s",
        92.8,
        NEMO_RL,
        _NEMO,
    ),
    Published(
        "the same, one step off-policy, 8+8",
        f"{_GRPO} {_LLAMA_8B} {_SERVERS} rollout.vllm.replicas=8",
        1123,
        "s",
        64.8,
        NEMO_RL,
        _NEMO,
    ),
    *(
        Published(
            f"Llama3-70B pre-training FP8, 64 GPUs, batch {batch}",
            f"{_PRETRAINING} rollout.prompts_per_step={batch}",
            8192,
            "tokens/s/GPU",
            value,
            MEGATRON_BRIDGE,
            _FP8,
        )
        for batch, value in ((128, 1619), (256, 1621))
    ),
)
"""The published runs, all on DGX H100."""


def markdown() -> str:
    """The comparison as a table, as in docs/planning.md."""
    lines = ["| run | published | planned | difference |", "|---|---|---|---|"]
    for run in RUNS:
        planned = run.planned()
        lines.append(f"| {run.name} | {run.value:g} {run.unit} | {planned:.0f} {run.unit} | {planned / run.value - 1:+.0%} |")
    return "\n".join(lines)

"""The stages of `tools/gpu_check.py`: each measures one thing on the GPU and returns numbers that JSON can hold.

T tokens, H hidden, V vocabulary columns.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measured problems.

    Attributes:
        matrix: the edge of the matrix products whose rate counts as the achievable peak.
        hidden, layers, vocab, ffn: sizes of the random student and teacher (full: 1.2 billion parameters).
        head_tokens, head_hidden: sizes for the output head alone, over `vocab` columns.
        responses, response_tokens, micro_tokens: sizes of a training step.
        slot_bytes: the size of a bucket that is passed between two processes.
        repeats: how often what is timed is repeated.
        dtype: the type of the weights.
        tests: pytest arguments that select among tests/gpu.
    """

    matrix: int
    hidden: int
    layers: int
    vocab: int
    ffn: int
    head_tokens: int
    head_hidden: int
    responses: int
    response_tokens: int
    micro_tokens: int
    slot_bytes: int
    repeats: int
    dtype: str
    tests: tuple[str, ...] = ()


SIZES = {
    "full": Sizes(8192, 2048, 16, 151936, 6144, 8192, 4096, 64, 1024, 16384, 256 << 20, 5, "bfloat16"),
    "small": Sizes(64, 128, 2, 256, 96, 32, 32, 4, 8, 64, 1 << 16, 1, "float32", ("-k", "chosen")),
}
PROMPT_TOKENS = 64
STEPS = 3
"""The steps of a training run; the first compiles and allocates, the last one counts."""


def environment(sizes: Sizes, folder: Path) -> Result:
    """The GPU, and the installed versions."""
    from kdrl_mcore.parallel.mcore import why_no_transformer_engine

    versions: Result = {}
    for package in ("torch", "triton", "megatron-core", "transformer-engine-torch", "vllm"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not found"
    device = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": device.total_memory / 2**30,
        "transformer_engine": why_no_transformer_engine() or "loads",
        **versions,
    }


def gpu_tests(sizes: Sizes, folder: Path) -> Result:
    """Run tests/gpu."""
    runner = ["tests.paper_cuda", "pytest"] if _on_paper() else ["pytest"]
    command = [sys.executable, "-m", *runner, "tests/gpu", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *sizes.tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    summary = next((line for line in reversed(lines) if "passed" in line or "failed" in line or "error" in line), "no summary")
    result: Result = {"summary": summary.strip("= ")}
    if done.returncode:
        result |= {"error": f"exit code {done.returncode}", "output": (lines + done.stderr.splitlines())[-60:]}
    return result


def matrices(sizes: Sizes, folder: Path) -> Result:
    """The rates of a large bfloat16 product and of a copy within the GPU's memory, with which other rates are compared."""
    rate = _matrix_tflops(sizes)
    source = torch.empty(sizes.matrix * sizes.matrix, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), sizes.repeats)
    return {"bfloat16_tflops": rate, "copy_gb_s": 2 * source.nbytes / seconds / 1e9}


def head(sizes: Sizes, folder: Path) -> Result:
    """Loss and gradients of the fused head, with log-probs and with each divergence, as shares of the measured peak."""
    from kdrl_mcore.vocab_parallel import (
        ExactForwardKL,
        ExactReverseKL,
        JensenShannon,
        TeacherInputs,
        TopKForwardKL,
        VocabShard,
        fused_head,
    )
    from kdrl_mcore.vocab_parallel.divergence import Divergence

    tokens, hidden, vocab = sizes.head_tokens, sizes.head_hidden, sizes.vocab
    dtype = getattr(torch, sizes.dtype)
    torch.manual_seed(1)

    def normal(rows: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(rows, hidden, device="cuda") * scale).to(dtype)

    hidden_TH, weight_VH = normal(tokens).requires_grad_(), normal(vocab, hidden**-0.5).requires_grad_()
    teacher_TH, teacher_VH = normal(tokens), normal(vocab, hidden**-0.5)
    rows_T = torch.arange(tokens, device="cuda")
    targets_T = torch.randint(0, vocab, (tokens,), device="cuda")
    divergences: dict[str, Divergence | None] = {
        "log_probs": None,
        "exact": ExactReverseKL(),
        "forward": ExactForwardKL(),
        "jensen_shannon": JensenShannon(0.5),
        "top_k_bucket": TopKForwardKL(50, "teacher", "bucket"),
    }

    def step(divergence: Divergence | None) -> None:
        hidden_TH.grad = weight_VH.grad = None
        fused_head(
            hidden_TH,
            weight_VH,
            rows_T,
            targets_T,
            lambda head, rows: (-head.log_probs if divergence is None else head.divergences) / tokens,
            VocabShard(None, 0, vocab, vocab),
            temperature=1.0,
            teacher=None if divergence is None else TeacherInputs(teacher_TH, teacher_VH, divergence),
        ).loss.backward()

    peak = _matrix_tflops(sizes)
    result: Result = {}
    for name, divergence in divergences.items():
        products = 6 if divergence is None else 8
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _seconds(partial(step, divergence), sizes.repeats)
        tflops = products * tokens * hidden * vocab / seconds / 1e12
        result |= {f"{name}_tflops": tflops, f"{name}_of_peak": tflops / peak}
        result[f"{name}_extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return result


def cuda_ipc(sizes: Sizes, folder: Path) -> Result:
    """Another process reads buckets in this process's GPU memory through IPC handles."""
    from kdrl_mcore.rollout.refit.stream import checksum
    from kdrl_mcore.rollout.refit.transport import CudaIpcSender

    sender = CudaIpcSender(sizes.slot_bytes, torch.device("cuda", torch.cuda.current_device()))
    sums = []
    for number, slot in enumerate(sender.slots):
        slot.copy_(torch.arange(sizes.slot_bytes, device="cuda").add_(number).remainder_(251))
        sums.append(checksum(slot))
    torch.cuda.synchronize()
    runner = ["tests.paper_cuda", "tools.gpu_stages"] if _on_paper() else ["tools.gpu_stages"]
    description = json.dumps({"bytes": sizes.slot_bytes, "repeats": sizes.repeats, **sender.describe(0, 1)})
    done = subprocess.run([sys.executable, "-m", *runner], input=description, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": "the other process failed", "output": done.stderr.splitlines()[-25:]}
    received = json.loads(done.stdout.splitlines()[-1])
    sender.close()
    if received["checksums"] != sums:
        return {"error": f"the other process read {received['checksums']}, this one wrote {sums}"}
    return {"buckets": len(sums), "bucket_mib": sizes.slot_bytes / 2**20, "read_gb_s": received["gb_s"]}


def receive() -> None:
    """The other process of `cuda_ipc`: reads the description from standard input, and prints the checksums and the rate."""
    from kdrl_mcore.rollout.refit.stream import checksum
    from kdrl_mcore.rollout.refit.transport import SLOTS, CudaIpcReceiver

    description = json.loads(sys.stdin.read())
    device = torch.device("cuda", torch.cuda.current_device())
    receiver, size = CudaIpcReceiver(description, device), description["bytes"]
    own = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = _seconds(lambda: own.copy_(receiver.take(0, size)), description["repeats"])
    sums = [checksum(receiver.take(slot, size).clone()) for slot in range(SLOTS)]
    receiver.close()
    print(json.dumps({"checksums": sums, "gb_s": 2 * size / seconds / 1e9}))


def train(sizes: Sizes, folder: Path) -> Result:
    """Training steps of KDRL with the exact divergence and Megatron-Core's layers: rates, and measured and planned memory."""
    return _train(sizes, folder, "local", ["model.spec=local", "teacher.offload=false"])


def train_with_off_loads(sizes: Sizes, folder: Path) -> Result:
    """The same with the optimizer's state and the teacher in host memory while idle."""
    return _train(sizes, folder, "off_loads", ["model.spec=local", "optimizer.offload=true", "teacher.offload=true"])


def train_with_transformer_engine(sizes: Sizes, folder: Path) -> Result:
    """The same with Transformer Engine's layers; skipped if it does not load."""
    from kdrl_mcore.parallel.mcore import why_no_transformer_engine

    why = why_no_transformer_engine()
    if why:
        return {"skipped": why}
    return _train(sizes, folder, "transformer_engine", ["model.spec=transformer_engine", "teacher.offload=false"])


def sample(sizes: Sizes, folder: Path) -> Result:
    """Tokens per second of the embedded engine."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

    prepare_platform()
    initialize_distributed(5)
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.student.student import Student
    from kdrl_mcore.types import Prompt

    class NoTokenizer:
        eos_ids = frozenset({0})

        def decode_response(self, token_ids: Any) -> str:
            return ""

    config = load_config(["objective=sft", f"student.path={_model(sizes, folder)}", f"model.dtype={sizes.dtype}"])
    student = Student(config, 1, sizes.vocab)
    engine = MegatronEngine(student.parts, NoTokenizer(), 256, lambda: 0)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    prompts = [Prompt(str(i), "", random.integers(1, sizes.vocab, PROMPT_TOKENS), "") for i in range(sizes.responses // 4)]
    limit = max(4, sizes.response_tokens // 8)
    found = {}

    def generate() -> None:
        rollouts = engine.generate(prompts, Sampling(1.0, 1.0, limit, 4, (1,)))
        found["tokens"] = sum(len(rollout.response_token_ids) for rollout in rollouts)

    seconds = _seconds(generate, 1)
    return {"sequences": sizes.responses, "tokens": found["tokens"], "tokens_per_s": found["tokens"] / seconds}


def _train(sizes: Sizes, folder: Path, name: str, overrides: list[str]) -> Result:
    from kdrl_mcore.cli.train import main
    from kdrl_mcore.config import load_config
    from kdrl_mcore.planning.memory import GIB, plan_memory
    from kdrl_mcore.planning.setup import make_setup
    from kdrl_mcore.planning.workload import Workload

    model, run = _model(sizes, folder), folder / name
    tokens = sizes.response_tokens
    overrides = [
        *("objective=kdrl", "objective.kd.estimator=exact", f"student.path={model}", f"teacher.path={model}"),
        *("rollout=replay", f"rollout.path={_rollouts(sizes, folder)}", f"rollout.max_response_tokens={tokens}"),
        *(f"model.dtype={sizes.dtype}", f"batch.micro_tokens={sizes.micro_tokens}"),
        *(f"trainer.steps={STEPS}", "trainer.self_test=false", f"run.dir={run}", "logging.progress=false"),
        *("logging.tensorboard=false", "logging.rollouts=false", "checkpoint.every=-1", "checkpoint.export_hf=false"),
        *overrides,
    ]
    code = main(overrides)
    if code:
        return {"error": f"training ended with exit code {code}"}
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    config = load_config(overrides)
    config.cluster.memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    planned = plan_memory(make_setup(config, Workload(sizes.responses, PROMPT_TOKENS, tokens, tokens), world_size=1))[0]
    sequence_tokens = sizes.responses * (PROMPT_TOKENS + tokens)
    return {
        "tokens_per_s": sequence_tokens / row["time/train"],
        "tflops": row["time/tflops"],
        "mfu": row.get("time/mfu", "unknown peak"),
        "head_share": row["time/head_share"],
        "loss": row["loss"],
        "times": {key: value for key, value in row.items() if key.startswith("time/")},
        "peak_gib": {key.removeprefix("memory/"): value for key, value in row.items() if key.startswith("memory/")},
        "planned_gib": {phase: planned.at(phase) / GIB for phase in ("rollout", "teacher", "head", "backward", "update")},
        "planned_items_gib": {item.kind: item.bytes / GIB for item in planned.items},
        "sizes": asdict(sizes),
    }


def _model(sizes: Sizes, folder: Path) -> Path:
    """A random Qwen2 with an untied head, without a tokenizer, so that every column is a token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    path = folder / "model"
    if not path.exists():
        config = Qwen2Config(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.ffn,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 64,
            num_key_value_heads=2,
            vocab_size=sizes.vocab,
            tie_word_embeddings=False,
            max_position_embeddings=32768,
            dtype=getattr(torch, sizes.dtype),
        )
        torch.manual_seed(0)
        unfinished = path.with_name("unfinished_model")
        Qwen2ForCausalLM._from_config(config).save_pretrained(unfinished)
        unfinished.replace(path)
    return path


def _rollouts(sizes: Sizes, folder: Path) -> Path:
    """A file of rollouts: groups of four responses of full length with random tokens."""
    from kdrl_mcore.rollout.files import write_rollouts
    from kdrl_mcore.types import Rollout

    path, random = folder / "rollouts.jsonl", np.random.default_rng(0)
    if not path.exists():
        rollouts = []
        for number in range(sizes.responses):
            if number % 4 == 0:
                prompt = random.integers(0, sizes.vocab, PROMPT_TOKENS)
            response = random.integers(0, sizes.vocab, sizes.response_tokens)
            log_probs = np.full(sizes.response_tokens, -np.log(sizes.vocab), dtype=np.float32)
            right = bool(random.integers(2))
            group = number // 4
            rollouts.append(Rollout(str(group), group, prompt, response, log_probs, "length", 0, float(right), right))
        write_rollouts(path, rollouts)
    return path


def _matrix_tflops(sizes: Sizes) -> float:
    left, right = (torch.randn(sizes.matrix, sizes.matrix, device="cuda").bfloat16() for _ in range(2))
    return 2 * sizes.matrix**3 / _seconds(lambda: left @ right, sizes.repeats) / 1e12


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """The seconds of one call on the GPU, after one that compiles and allocates."""
    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def _on_paper() -> bool:
    return "tests.paper_cuda" in sys.modules


if __name__ == "__main__":
    receive()

"""Small random models, tokenizers and rollouts, the same for the same seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from tests.reference.dense import Row, load_model, log_prob_of, response_logits

EOS = "<|end|>"
# Every character of the tests' ASCII text, in the spelling of byte-level BPE: newline is U+010A, space U+0120.
CHARACTERS = "\u010a\u01200123456789+-*/=()[]{}\\.,:;?!_^<>abcdefghijklmnopqrstuvwxyz"


def make_qwen2(
    path: str | Path,
    *,
    seed: int,
    vocab_size: int = 67,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    intermediate_size: int = 96,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a random Qwen2 checkpoint (safetensors) and return its directory.

    Every tensor is random, also biases and norms, so that a lost, swapped or transposed one is noticed.

    Args:
        max_shard_size: a small size, such as "50KB", gives several files and an index.
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return _write_random(config, path, seed, dtype, max_shard_size)


def make_model(
    family: str,
    path: str | Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **settings: Any,
) -> Path:
    """Write a random checkpoint of a family and return its directory. It has the family's peculiarities: `qwen3` has a head
    dimension that is not hidden / heads, `llama` llama3 rope scaling, `qwen3_moe` 8 experts, 2 per token.

    Args:
        settings: HF config values that replace the defaults.
    """
    shared = {
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    alternating = ["sliding_attention", "full_attention"] * 2
    late = ["sliding_attention"] * 3 + ["full_attention"]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    scaled_where_full = {
        "full_attention": {**yarn, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    classes: dict[str, tuple[Any, dict]] = {
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 32}),
        "llama": (LlamaConfig, {"rope_parameters": llama3}),
        "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": 12}),
        "ministral": (MinistralConfig, {"head_dim": 16, "sliding_window": 9, "layer_types": alternating}),
        "seed_oss": (SeedOssConfig, {"head_dim": 32}),
        "smollm3": (SmolLM3Config, {}),
        "granite": (
            GraniteConfig,
            {
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.1,
                "logits_scaling": 5.0,
            },
        ),
        "olmo2": (Olmo2Config, {}),
        "olmo3": (Olmo3Config, {"sliding_window": 7, "rope_parameters": scaled_where_full}),
        "gemma3": (Gemma3TextConfig, {"head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 6, "layer_types": late}),
        "phi3": (Phi3Config, {"partial_rotary_factor": 0.75}),
        "qwen3_moe": (
            Qwen3MoeConfig,
            {
                "head_dim": 32,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 48,
                "norm_topk_prob": True,
            },
        ),
        "glm4_moe": (
            Glm4MoeConfig,
            {
                "head_dim": 32,
                "attention_bias": True,
                "use_qk_norm": True,
                "n_routed_experts": 8,
                "n_shared_experts": 2,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 1,
                "num_nextn_predict_layers": 0,
            },
        ),
    }
    config_class, own = classes[family]
    return _write_random(config_class(**{**shared, **own, **settings}), path, seed, dtype, max_shard_size)


def _write_random(config: Any, path: str | Path, seed: int, dtype: torch.dtype, max_shard_size: str) -> Path:
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # of the size of the scores' differences
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    model.to(dtype).save_pretrained(str(path), max_shard_size=max_shard_size)
    return Path(path)


def add_kept_layer(path: Path) -> Path:
    """Add some tensors of a layer that predicts further tokens, which published checkpoints of GLM-4.5 hold."""
    config = json.loads((path / "config.json").read_text())
    layer, hidden = config["num_hidden_layers"], config["hidden_size"]
    generator = torch.Generator().manual_seed(9)
    more = {
        "eh_proj.weight": torch.randn(hidden, 2 * hidden, generator=generator).bfloat16(),
        "enorm.weight": torch.randn(hidden, generator=generator).bfloat16(),
        "mlp.gate.e_score_correction_bias": torch.randn(8, generator=generator),
    }
    (path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}, indent=2) + "\n")
    tensors = {**read_hf_weights(path), **{f"model.layers.{layer}.{name}": tensor for name, tensor in more.items()}}
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_tokenizer(path: str | Path, *, extra_tokens: Sequence[str] = (), all_bytes: bool = False) -> int:
    """Write a byte-level BPE tokenizer without merges into a model directory and return its number of tokens.

    Token 0 ends a response. Then come `CHARACTERS` (60 tokens), or all 256 bytes, then `extra_tokens`.
    """
    pieces = [EOS, *(sorted(pre_tokenizers.ByteLevel.alphabet()) if all_bytes else CHARACTERS), *extra_tokens]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, *extra_tokens])
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(pieces)


def make_rollouts(
    student_path: str | Path,
    *,
    seed: int,
    num_groups: int = 3,
    group_size: int = 4,
    vocab_size: int = 64,
    max_prompt_tokens: int = 9,
    prompt_tokens: int | None = None,
    max_response_tokens: int = 17,
    temperature: float = 1.0,
    noise: float = 0.0,
    correct: Sequence[bool] | None = None,
    rewards: Sequence[float] | None = None,
) -> list[Row]:
    """Random rollouts of uneven lengths, the first response of a single token.

    Args:
        vocab_size: all token ids are smaller, and it is the size of the softmax for the log-probs.
        prompt_tokens: the number of tokens in every prompt, in place of a random one.
        noise: standard deviation of sampler_log_probs around the student's true log-probs; 0 means the same policy.
        correct: per response; by default random, with both kinds in the first group and the last group all incorrect.
        rewards: per response; by default 1 for correct and 0 for incorrect.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    number = num_groups * group_size
    if correct is None:
        flags = [bool(value) for value in draw(0, 2, number)]
        flags[-group_size:] = [False] * group_size
        flags[0], flags[group_size - 1] = True, False
        correct = flags
    if rewards is None:
        rewards = [float(flag) for flag in correct]
    if len(correct) != number or len(rewards) != number:
        raise ValueError(f"correct and rewards need {number} values")
    student = load_model(student_path)
    rows: list[Row] = []
    for group in range(num_groups):
        prompt = draw(1, vocab_size, prompt_tokens or draw(1, max_prompt_tokens + 1)[0])
        for _ in range(group_size):
            index = len(rows)
            length = 1 if index == 0 else draw(2, max_response_tokens + 1)[0]
            response = draw(1, vocab_size, length)
            stops = bool(draw(0, 2)[0])
            if stops:
                response[-1] = 0
            row: Row = {
                "prompt_id": f"p{group}",
                "group_id": group,
                "prompt_token_ids": prompt,
                "response_token_ids": response,
                "sampler_log_probs": [],
                "reward": rewards[index],
                "correct": correct[index],
                "finish_reason": "stop" if stops else "length",
                "weight_version": 0,
            }
            with torch.no_grad():
                true = log_prob_of(response_logits(student, row, vocab_size, temperature).log_softmax(-1), row)
            mu = true + noise * torch.randn(length, generator=generator, dtype=true.dtype)
            row["sampler_log_probs"] = mu.float().tolist()
            rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSONL, one per line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_hf_weights(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of an HF directory by name, from one or several safetensors files."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no safetensors file")
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        if twice := weights.keys() & tensors.keys():
            raise ValueError(f"{file} repeats {min(twice)}")
        weights.update(tensors)
    return weights


def make_pair(folder: Path, prompts: Sequence[str]) -> Path:
    """Write a tied `student` and an untied `teacher`, both with a tokenizer, and `train.jsonl`, in which every answer is 5."""
    for name, seed in (("student", 11), ("teacher", 12)):
        make_qwen2(folder / name, seed=seed, tied=name == "student")
        make_tokenizer(folder / name)
    write_jsonl(folder / "train.jsonl", [{"prompt": prompt, "answer": "5"} for prompt in prompts])
    return folder

"""The engines of `tools/bench.py generate`, one process each: `python -m benchmarks.generate_engines ENGINE FOLDER`.

`FOLDER/work.json` describes what is generated. The last line is a JSON object: for every number of sequences the seconds of
each repeat of a whole generation, and of one that ends with its first token, each by the clock and of CPU time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Generate = Callable[[list[list[int]], int], int]
"""(prompts, tokens of every response) -> tokens generated in all."""


def main(engine: str, folder: Path) -> None:
    """Time one engine."""
    work = json.loads((folder / "work.json").read_text())
    generate = ENGINES[engine](work)
    random = np.random.default_rng(1)
    times: dict[str, dict[str, list[float]]] = {}
    for sequences in work["sequences"]:
        prompts = random.integers(100, work["vocab"] - 100, (sequences, work["prompt_tokens"])).tolist()
        generate(prompts, 2)
        found: dict[str, list[float]] = {"all": [], "first": [], "all_cpu": [], "first_cpu": []}
        for _ in range(work["repeats"]):
            for name, tokens in (("first", 1), ("all", work["tokens"])):
                start, cpu_start = time.perf_counter(), time.process_time()
                count = generate(prompts, tokens)
                found[name].append(time.perf_counter() - start)
                found[f"{name}_cpu"].append(time.process_time() - cpu_start)
                assert count == sequences * tokens, f"{engine} generated {count} tokens instead of {sequences * tokens}"
        times[str(sequences)] = found
    print(json.dumps(times), flush=True)


def embedded(work: dict[str, Any]) -> Generate:
    """This trainer's engine."""
    from kdrl_mcore.config import load_config
    from kdrl_mcore.parallel.platform import initialize_distributed, prepare_platform

    prepare_platform()
    initialize_distributed(5)
    from kdrl_mcore.convert.load import load_weights
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.gpt import build_model
    from kdrl_mcore.parallel.layout import Layout, create_scoring_groups
    from kdrl_mcore.rollout.engine import Sampling
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.types import Prompt

    class NoTokenizer:
        eos_ids: frozenset[int] = frozenset()

        def decode_response(self, token_ids: Any) -> str:
            return ""

    path = work["model"]
    config = load_config(["objective=sft", f"student.path={path}", f"model.dtype={work['dtype']}"])
    architecture = read_architecture(path)
    parts = build_model(
        architecture, config.model, create_scoring_groups(Layout(1)), vocab_size=architecture.vocab_size, trainable=False
    )
    load_weights(parts, path)
    engine = MegatronEngine(parts, NoTokenizer(), max(work["sequences"]), lambda: 0)  # type: ignore[arg-type]

    def generate(prompts: list[list[int]], tokens: int) -> int:
        asked = [Prompt(str(i), "", np.array(ids, dtype=np.int64), "") for i, ids in enumerate(prompts)]
        rollouts = engine.generate(asked, Sampling(1.0, 1.0, tokens, 1, (1,)))
        return sum(len(rollout.response_token_ids) for rollout in rollouts)

    return generate


def transformers(work: dict[str, Any]) -> Generate:
    """`generate` of transformers, which returns no log-probs."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)

    def generate(prompts: list[list[int]], tokens: int) -> int:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
        return int(out[:, ids.size(1) :].numel())

    return generate


def vllm(work: dict[str, Any]) -> Generate:
    """vLLM, which returns the log-probs that training needs, without its cache of prompts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = work["prompt_tokens"] + work["tokens"]
    engine = LLM(
        model=work["model"],
        dtype=work["dtype"],
        enforce_eager=work["eager"],
        distributed_executor_backend="uni",
        skip_tokenizer_init=True,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        max_model_len=longest + 1,
        max_num_seqs=max(work["sequences"]),
        max_num_batched_tokens=max(work["sequences"]) * longest,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> int:
        how = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
        outputs = engine.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], how, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return generate


def floor(work: dict[str, Any]) -> Generate:
    """No engine: only the matrix products, with all weights in turn, each as fast as torch or oneDNN computes it here."""
    import torch
    from torch.nn import functional as F

    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model.families import read_architecture
    from kdrl_mcore.model.linear import pack, product

    torch.set_grad_enabled(False)
    a, dtype = read_architecture(work["model"]), getattr(torch, work["dtype"])
    heads = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
    shapes = [
        *((heads, a.hidden_size), (a.hidden_size, a.num_attention_heads * a.head_dim)),
        *((2 * a.ffn_hidden_size, a.hidden_size), (a.hidden_size, a.ffn_hidden_size)),
    ]
    plain = [torch.randn(shape, dtype=dtype) for _ in range(a.num_layers) for shape in shapes]
    plain.append(torch.randn(a.vocab_size, a.hidden_size, dtype=dtype))
    packed = [weight if (copy := pack(weight)) is None else copy for weight in plain]
    ways: list[Callable[[Any, int], Any]] = [
        lambda x, i: F.linear(x, plain[i]),
        lambda x, i: product(x, packed[i]),
    ]
    fastest: dict[int, Callable[[Any, int], Any]] = {}

    def multiply(way: Callable[[Any, int], Any], rows: int, head_rows: int) -> None:
        inputs = {k: torch.randn(rows, k, dtype=dtype) for _, k in shapes}
        for i, weight in enumerate(plain[:-1]):
            way(inputs[weight.size(1)], i)
        way(inputs[a.hidden_size][:head_rows], len(plain) - 1)

    def choose(rows: int, head_rows: int) -> Callable[[Any, int], Any]:
        if rows not in fastest:
            seconds = []
            for way in [*ways, *ways, *ways]:
                start = time.perf_counter()
                multiply(way, rows, head_rows)
                seconds.append(time.perf_counter() - start)
            fastest[rows] = ways[seconds.index(min(seconds)) % len(ways)]
        return fastest[rows]

    def generate(prompts: list[list[int]], tokens: int) -> int:
        count, rows = len(prompts), sum(map(len, prompts))
        multiply(choose(rows, count), rows, count)
        for _ in range(tokens - 1):
            multiply(choose(count, count), count, count)
        return count * tokens

    return generate


ENGINES: dict[str, Callable[[dict[str, Any]], Generate]] = {
    "this engine": embedded,
    "transformers": transformers,
    "vLLM": vllm,
    "products": floor,
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

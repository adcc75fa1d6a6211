"""`python -m tests.support.vllm_lora MODEL ADAPTER RANK`: vLLM samples with an adapter. Prints, as JSON, the tokens that follow
`PROMPT` and their log-probs."""

from __future__ import annotations

import json
import sys

PROMPT = [1, 5, 9, 33, 7]


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, adapter, rank = sys.argv[1:]
    engine = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=max(8, int(rank)),
        max_model_len=64,
        max_num_seqs=4,
        logprobs_mode="processed_logprobs",
    )
    settings = SamplingParams(temperature=1.0, max_tokens=12, logprobs=0, seed=3, ignore_eos=True)
    request = LoRARequest("student", 1, adapter)
    (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], settings, lora_request=request, use_tqdm=False)
    tokens = list(answer.outputs[0].token_ids)
    log_probs = [each[token].logprob for each, token in zip(answer.outputs[0].logprobs, tokens, strict=True)]
    print(json.dumps([tokens, log_probs]))


if __name__ == "__main__":
    main()

"""The plain loop of `tools/bench.py peers`: `python peers_plain.py FOLDER`.

transformers generates, the whole logits are materialised for eight sequences at a time, and torch's AdamW updates. Prints the
seconds of each step as its last line, in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SEQUENCES = 8


def main(folder: Path) -> None:
    """Train for one step more than is measured."""
    work = json.loads((folder / "work.json").read_text())
    torch.set_num_threads(work["threads"])
    dtype = getattr(torch, work["dtype"])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(work["student"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    student = AutoModelForCausalLM.from_pretrained(work["student"], dtype=dtype)
    teacher = AutoModelForCausalLM.from_pretrained(work["teacher"], dtype=dtype).eval() if work["teacher"] else None
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    times: dict[str, list[float]] = {"step": [], "generation": [], "teacher": [], "train": []}
    for step in range(1 + work["steps"]):
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
            )
            for row in rows[step * work["prompts"] : (step + 1) * work["prompts"]]
            for _ in range(work["responses"])
        ]
        start = time.perf_counter()
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            ids = student.generate(**inputs, do_sample=True, max_new_tokens=work["tokens"], min_new_tokens=work["tokens"])
        mask = torch.cat((inputs["attention_mask"], torch.ones(len(ids), work["tokens"], dtype=torch.long)), dim=1)
        generated = time.perf_counter()
        responses = tokenizer.batch_decode(ids[:, -work["tokens"] :])
        rewards = torch.tensor([float(crc32(text.encode()) % 2) for text in responses]).view(work["prompts"], -1)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        parts = [slice(start, start + SEQUENCES) for start in range(0, len(ids), SEQUENCES)]
        with torch.no_grad():
            targets = [] if teacher is None else [log_probs(teacher, ids[p], mask[p], work["tokens"]) for p in parts]
        scored = time.perf_counter()
        for number, part in enumerate(parts):
            values = log_probs(student, ids[part], mask[part], work["tokens"])
            loss = -(torch.exp(values - values.detach()) * advantages[part, None]).sum()
            if targets:
                loss = loss + 0.002 * 0.5 * (values - targets[number]).square().sum()
            (loss / (len(ids) * work["tokens"])).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        for name, seconds in zip(times, (end - start, generated - start, scored - generated, end - scored), strict=True):
            times[name].append(seconds)
    print(json.dumps(times))


def log_probs(model: torch.nn.Module, ids: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """The log-probs of the last `tokens` tokens of each sequence, float32."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=tokens + 1).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(2, ids[:, -tokens:, None]).squeeze(2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""TRL's part of `tools/bench.py peers`: `python peers_trl.py FOLDER MICRO_BATCHES`, in TRL's own environment.

Prints the seconds of each step as its last line, in JSON. It imports nothing from this project.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any
from zlib import crc32


def main(folder: Path, micro_batches: int) -> None:
    """Train for one step more than is measured."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    work = json.loads((folder / "work.json").read_text())
    torch.set_num_threads(work["threads"])
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    times: dict[str, list[float]] = {"step": [], "generation": [], "train": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["step"].append(time.perf_counter() - self.start)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(crc32(completion[0]["content"].encode()) % 2) for completion in completions]

    sequences = work["prompts"] * work["responses"]
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=sequences // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=work["responses"],
        max_completion_length=work["tokens"],
        max_steps=1 + work["steps"],
        beta=0.002 if work["teacher"] else 0.0,
        learning_rate=1e-6,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        shuffle_dataset=False,
    )
    model = AutoModelForCausalLM.from_pretrained(work["student"], dtype=getattr(torch, work["dtype"]))
    if work["teacher"]:
        model.config._name_or_path = work["teacher"]  # TRL loads the model of its KL term from here
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(work["student"], padding_side="left"),
        callbacks=[Clock()],
    )
    generate = trainer.model.generate

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        output = generate(*arguments, **options)
        times["generation"].append(time.perf_counter() - start)
        assert output.shape[1] - options["input_ids"].shape[1] == work["tokens"] if "input_ids" in options else True
        return output

    trainer.model.generate = timed
    trainer.train()
    times["train"] = [
        step - generation for step, generation in zip(times["step"], times["generation"], strict=True)
    ]  # forward and backward passes, the model of the KL term included
    print(json.dumps(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

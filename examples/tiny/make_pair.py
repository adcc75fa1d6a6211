"""Make the tiny student and teacher: data, random checkpoints, then supervised training with this project's trainer.

    python examples/tiny/make_pair.py [--task logic | sparse | ...]

The teacher is trained to the end on flawed answers, so it is good but wrong in a systematic way. The student is trained at a
constant learning rate on correct answers, with an evaluation and a checkpoint every few steps. The checkpoint whose validation
accuracy is nearest to `STUDENT_ACCURACY` becomes the student: stopped half-way, it can still learn. Both train at the same
time, with one thread each. Existing files are kept. The tasks of mechanisms.py differ in what they say of the pair.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from examples.jobs import ROOT, Job, follow, start_training
from examples.tiny import logic, mechanisms
from examples.tiny.task import TEACHER_SET, make_tokenizer, write_data
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.monitoring.metrics import read_metrics

STUDENT_ACCURACY = 0.45


@dataclass(frozen=True)
class Task:
    """The task of a pair.

    Attributes:
        directory: where the pair is stored, relative to the project root.
        write_data: writes its data sets to a folder, given the share of flawed steps in the teacher's data and a seed.
        overrides: its settings for all runs.
        student_accuracy: the validation accuracy near which the student stops; None for its last checkpoint.
    """

    directory: Path
    write_data: Callable[[Path, float, int], None]
    overrides: tuple[str, ...] = ()
    student_accuracy: float | None = STUDENT_ACCURACY


DEFAULT_DIR = Path("runs/tiny")
SUMS = Task(DEFAULT_DIR, write_data)
TASKS = {
    "sums": SUMS,
    "logic": Task(Path("runs/tiny_logic"), logic.write_data, ("reward=exact_match",)),
    "sparse": Task(Path("runs/tiny_sparse"), mechanisms.write_sparse, student_accuracy=None),
    "sparse_flawed": Task(Path("runs/tiny_sparse_flawed"), mechanisms.write_sparse_flawed, student_accuracy=None),
    "verbose": Task(Path("runs/tiny_verbose"), mechanisms.write_verbose, ("rollout.max_response_tokens=96",)),
    "domains": Task(Path("runs/tiny_domains"), mechanisms.write_domains),
    "longer": Task(Path("runs/tiny_longer"), mechanisms.write_longer),
}
SEED = 0
FLAW_RATE = 0.8
"""The share of flawed additions in the teacher's data; the teacher's accuracy then ends between 80 % and 90 %."""
STUDENT_CHECKPOINT_EVERY = 25

SIZES: dict[str, dict[str, int]] = {
    "student": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
    "teacher": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "student_small": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1},
    "student_large": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
}
"""All have 2 layers, heads of width 32 and a tied output head; the pair has 0.1M and 0.3M parameters. Other teachers have the
teacher's size."""
PAIR = ("student", "teacher")
VARIANTS: dict[str, list[str]] = {
    "teacher_weak": ["trainer.steps=400"],  # half of the training
    "teacher_strong": ["data.train={directory}/data/sft.jsonl"],  # correct answers
    "student_small": ["trainer.steps=2000", "eval.every=50", "checkpoint.every=50"],  # half as wide: it learns slowly
    "student_large": [],
}
"""The further models for the studies of teacher strength and student scale, and how their training differs
(`conf/study/base/tiny.yaml`; made by `examples/tiny/make_family.py`)."""


def main() -> int:
    """Make the pair unless it exists; returns the exit code, 1 with one line if a step fails."""
    parser = argparse.ArgumentParser(description="Make the tiny student and teacher of the CPU example.")
    parser.add_argument("--task", choices=TASKS, default="sums", help="what the pair learns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of data and models (default: runs/tiny, runs/tiny_logic)")
    arguments = parser.parse_args()
    try:
        make_pair(arguments.output or TASKS[arguments.task].directory, TASKS[arguments.task])
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_pair(directory: Path, task: Task = SUMS) -> None:
    """Write `directory/{data,init_student,init_teacher,student,teacher}` (relative to the project root); keep what exists.

    Raises:
        KdrlError: a training run or the export failed.
    """
    absolute = ROOT / directory
    if not (absolute / "data").is_dir():
        print(f"writing data to {directory / 'data'}", flush=True)
        unfinished = absolute / "data.unfinished"
        task.write_data(unfinished, FLAW_RATE, SEED)
        unfinished.rename(absolute / "data")
    make_models(PAIR, directory, task)


def make_models(names: Sequence[str], directory: Path, task: Task = SUMS) -> None:
    """Train the models that do not exist, at the same time: students to the task's accuracy, teachers to the end.

    Raises:
        KdrlError: a training run or the export failed.
    """
    started, absolute = time.monotonic(), ROOT / directory
    missing = [name for name in names if not (absolute / name).is_dir()]
    for name in missing:
        write_random_model(absolute / f"init_{name}", name)
    if not missing:
        return
    print(f"training {' and '.join(missing)} (about a minute each)", flush=True)
    follow([_start(name, directory, task) for name in missing])
    for name in missing:
        _finish(name, directory, task)
    print(f"made {' and '.join(missing)} in {time.monotonic() - started:.0f} s", flush=True)


def write_random_model(directory: Path, name: str) -> None:
    """Write a randomly initialised student or teacher as an HF checkpoint with its tokenizer."""
    transformers_logging.disable_progress_bar()
    tokenizer = make_tokenizer()
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            num_hidden_layers=2,
            max_position_embeddings=256,
            initializer_range=0.06,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **SIZES[name if name in SIZES else _role(name)],
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _role(name: str) -> str:
    return name.split("_")[0]


def _start(name: str, directory: Path, task: Task) -> Job:
    own = {
        "student": [
            f"data.train={directory}/data/sft.jsonl",
            f"eval.every={STUDENT_CHECKPOINT_EVERY}",
            f"checkpoint.every={STUDENT_CHECKPOINT_EVERY}",
            "checkpoint.keep=0",
            "checkpoint.export_hf=false",
        ],
        "teacher": [
            f"data.train={directory}/data/{TEACHER_SET}.jsonl",
            "trainer.steps=800",
            "rollout.prompts_per_step=32",
            "optimizer.lr=3e-3",
            "optimizer.schedule=cosine",
            "checkpoint.every=-1",
        ],
    }
    return start_training(
        name,
        directory / f"sft_{name}",
        [
            "experiment=tiny_sft",
            f"student.path={directory}/init_{name}",
            f"data.eval={directory}/data/validation.jsonl",
            f"trainer.seed={SEED}",
            *task.overrides,
            *own[_role(name)],
            *(override.format(directory=directory) for override in VARIANTS.get(name, [])),
        ],
    )


def _finish(name: str, directory: Path, task: Task) -> None:
    """Move the trained model into place; its folder appears only once it is complete."""
    run_dir, unfinished = directory / f"sft_{name}", ROOT / directory / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if _role(name) == "teacher":
        shutil.copytree(ROOT / run_dir / "hf", unfinished)
    else:
        step, accuracy = nearest_step(ROOT / run_dir, task.student_accuracy)
        print(f"{name}: step {step}, validation accuracy {accuracy:.1%}", flush=True)
        _export(run_dir / "checkpoints" / f"step_{step:06d}", unfinished)
    unfinished.rename(ROOT / directory / name)


def nearest_step(run_dir: Path, wanted: float | None) -> tuple[int, float]:
    """The step whose validation accuracy is nearest to the wanted one (None: the last step), and its accuracy."""
    accuracy = {int(row["step"]): row["eval/accuracy"] for row in read_metrics(run_dir) if "eval/accuracy" in row}
    step = max(accuracy) if wanted is None else min(accuracy, key=lambda step: abs(accuracy[step] - wanted))
    return step, accuracy[step]


def _export(checkpoint: Path, output: Path) -> None:
    command = [sys.executable, "tools/convert_hf.py", "export", "--checkpoint", str(checkpoint), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise KdrlError(f"export of {checkpoint} failed: {done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    sys.exit(main())

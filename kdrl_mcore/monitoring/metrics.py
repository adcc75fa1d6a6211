"""The metrics of a run: one JSON line per step in `metrics.jsonl`, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

from kdrl_mcore.errors import DataError

METRICS_FILE = "metrics.jsonl"

METRICS: dict[str, str] = {
    "reward": "mean reward of the step's responses",
    "accuracy": "share of the step's responses that are correct",
    "loss": "alpha * policy_loss + beta * kd_loss",
    "policy_loss": "GRPO loss",
    "kd_loss": "distillation loss",
    "reference_loss": "KL to the initial student, where objective.reference_kl is on",
    "kl": "reverse KL to the teacher, nats per token (k1)",
    "kl_k2": "the same, estimated with k2",
    "kl_k3": "the same, estimated with k3",
    "kl_full": "the divergence of objective.kd.estimator itself, nats per token (exact, top_k, top_k_unbiased)",
    "entropy": "entropy of the student, nats per token",
    "response_length": "mean response length, tokens",
    "truncated": "share of responses that hit the length limit",
    "alpha": "coefficient of the policy loss",
    "beta": "coefficient of the distillation loss",
    "lr": "learning rate",
    "grad_norm": "global gradient norm before clipping",
    "grad_norm_policy": "norm of alpha * the GRPO gradient, where logging.gradient_split_every measures it",
    "grad_norm_kd": "norm of beta * the distillation gradient, likewise",
    "grad_cosine": "cosine between the two",
    "clip_share": "share of tokens whose policy ratio was clipped",
    "skipped_updates": "updates skipped for NaN or Inf in this step",
    "drift_mean": "mean |sampler - trainer| log-prob per token, nats",
    "drift_max": "largest |sampler - trainer| log-prob, nats",
    "teacher_tokens": "response tokens the teacher scored in this step",
    "teacher_tokens_early": "of these, scored while other responses were being sampled (teacher.score_while_sampling)",
    "teacher_tokens_saved": "response tokens the mask kept from the teacher in this step",
    "tokens": "prompt and response tokens trained on in this step",
    "samples": "responses sampled in this step",
    "eval/accuracy": "held-out accuracy of sampled responses (avg@k), mean over benchmarks",
    "eval/accuracy_stderr": "its standard error, clustered by prompt",
    "eval/accuracy_low": "lower end of its 95 % interval (bootstrap over prompts)",
    "eval/accuracy_high": "upper end",
    "eval/greedy_accuracy": "held-out accuracy of greedy responses, mean over benchmarks",
    "eval/response_length": "mean held-out response length, tokens",
    "eval/truncated": "share of held-out responses that hit the length limit",
    "time/refit": "seconds spent on giving the engines the student's weights",
    "time/rollout": "seconds spent sampling",
    "time/reward": "seconds spent verifying",
    "time/teacher": "seconds spent on the teacher",
    "time/train": "seconds spent on the student's updates",
    "time/head": "of time/train, seconds in the output head (of the rank that spends most)",
    "time/step": "seconds of the whole step",
    "time/head_share": "time/head as a share of time/train",
    "time/tflops": "TFLOP/s of each rank in the student's updates, by what the model needs (no recomputation, no padding)",
    "memory/refit": "on CUDA: GiB that rank 0's tensors took at most during the refit",
    "memory/rollout": "the same while sampling",
    "memory/reward": "while verifying",
    "memory/teacher": "while the teacher scored",
    "memory/train": "during the student's updates",
    "time/mfu": "the same as a share of the GPU's peak (cluster.peak_tflops, or that of a GPU in conf/cluster)",
}
"""The names the trainer writes, and what each one is. Counts and seconds are those of the one step. Besides, `eval/pass@k`,
`eval/maj@k` and each benchmark's own `eval/NAME/...` (`evaluation.evaluate.summarize`)."""


class MetricsLog:
    """Appends the metrics of one run; on a resumed run call `truncate_after` first, so that each step stands there once."""

    def __init__(self, run_dir: Path, tensorboard: bool) -> None:
        """Open `run_dir/metrics.jsonl` for appending, and `run_dir/tensorboard` when `tensorboard` is set."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard_dir = run_dir / "tensorboard" if tensorboard else None
        self._writer: SummaryWriter | None = None
        self._open_tensorboard(purge_step=None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `metrics` as one line `{"step": step, ...}`, on disk when this returns.

        NaN and infinities become the strings "NaN", "Infinity" and "-Infinity": JSON has no numbers for them, and
        `read_metrics` turns them back.
        """
        row = {"step": step, **{name: _to_json(float(value)) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, float(value), step)
            self._writer.flush()

    def truncate_after(self, step: int) -> None:
        """Drop every line of a step after `step`, and a last line that a killed run left incomplete."""
        self._file.close()
        kept = [line for line, row in _complete_rows(self._path) if row["step"] <= step]
        shortened = self._path.with_suffix(".tmp")
        shortened.write_text("".join(kept), encoding="utf-8")
        shortened.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._open_tensorboard(purge_step=step + 1)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_tensorboard(self, purge_step: int | None) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=purge_step)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of a run, one dict per step in ascending order (`step` among its keys).

    Lines of the same step (training and evaluation) are merged. A last line without its newline, which a run in progress
    may show, is left out.

    Raises:
        DataError: no `metrics.jsonl` in `run_dir`, no line in it, or a line that is not a JSON object with a step.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir}: no {METRICS_FILE} there; name a run directory (run.dir) that has trained a step")
    steps: dict[int, dict[str, float]] = {}
    for _, row in _complete_rows(path):
        steps.setdefault(int(row["step"]), {}).update(row)
    if not steps:
        raise DataError(f"{path}: holds no metrics yet; wait for the run's first step")
    return [steps[step] for step in sorted(steps)]


def _complete_rows(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each line that ends in a newline, with its parsed metrics."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            row = {name: float(value) for name, value in json.loads(line).items()}
            row["step"]
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object of numbers with a step; repair or remove it") from error
        yield line, row


def _to_json(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value

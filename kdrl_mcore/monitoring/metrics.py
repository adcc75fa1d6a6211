"""The metrics of a run: one JSON line per step in `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from kdrl_mcore.errors import DataError
from kdrl_mcore.resilience.files import write_file

METRICS_FILE = "metrics.jsonl"
LARGEST = 1e100
"""A larger number counts as infinite, so that sums and squares of what is left are finite. float32 ends at 3e38."""
LAST_STEP = 10**12
"""A line with a later step is damaged."""

METRICS: dict[str, str] = {
    "reward": "mean reward of the step's responses",
    "reward_stderr": "its standard error, clustered by prompt",
    "accuracy": "share of the step's responses that are correct",
    "accuracy_stderr": "its standard error, clustered by prompt",
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
    "truncated_correct": "share of responses that hit it and count as correct (reward.accept_truncated)",
    "verifier_timeouts": "responses whose verification reward.timeout ended: score 0, though not judged wrong",
    "verifier_crashes": "responses during whose verification the process ended, likewise",
    "alpha": "coefficient of the policy loss",
    "beta": "coefficient of the distillation loss",
    "lr": "learning rate",
    "grad_norm": "global gradient norm before clipping",
    "grad_norm_policy": "norm of alpha * the GRPO gradient, where logging.gradient_split_every measures it",
    "grad_norm_kd": "norm of beta * the distillation gradient, likewise",
    "grad_cosine": "cosine between the two, unless one is zero",
    "clip_share": "share of tokens whose policy ratio was clipped",
    "taught_share": "share of the tokens that are distilled with a weight above 0 (objective.combine, kd.token_weight)",
    "gated_share": "share of tokens whose advantage objective.combine changed",
    "mixed_share": "share of distillation that is the divergence over the vocabulary, not k2 (objective.kd.mix)",
    "kd_cut_share": "share of the distilled tokens whose weight pi/mu the bounds of objective.kd.importance change",
    "corrected_share": "share of tokens to which objective.sampler_correction gives a weight other than 1",
    "correction_ess": "effective sample size of these weights, as a share of the tokens",
    "kd_importance_ess": "the same of the bounded weights pi/mu of distillation (objective.kd.importance)",
    "skipped_updates": "updates skipped for NaN or Inf in this step",
    "rollout_ess": "effective sample size of pi/mu, as a share of the tokens, where other weights sampled them",
    "drift_mean": "mean |sampler - trainer| log-prob per token, nats",
    "drift_max": "largest |sampler - trainer| log-prob, nats",
    "teacher_tokens": "response tokens the teacher scored in this step",
    "distilled_responses": "share of the step's responses that mask and combination (such as gate) leave to the teacher",
    "teacher_tokens_early": "of these, scored while other responses were being sampled (teacher.score_while_sampling)",
    "teacher_tokens_dropped": "further tokens, scored early for groups that rollout.group_filter then dropped",
    "teacher_text_copied": "share of response tokens copied from what only the teacher reads (runs of 8 tokens and more)",
    "answer_place": "where the reference answer first occurs in the responses that contain it, 0 to 1 (teacher.prompt)",
    "untaught_responses": "several teachers: responses in this step that none of them teaches",
    "teacher_tokens_saved": "response tokens that mask, combination and token weight kept from the teacher in this step",
    "tokens": "prompt and response tokens trained on in this step",
    "samples": "responses trained on in this step",
    "given_responses": "of these, given ones (rollout.given); rewards, lengths, entropy, kl and drift leave them out",
    "given_tokens": "their tokens",
    "groups_sampled": "groups sampled for this step (rollout.group_filter)",
    "signal_share": "share of these with correct and incorrect responses",
    "resampling_rounds": "how many times further prompts were sampled for it",
    "token_age": "mean age of the tokens trained on: updates between the weights that sampled them and the student",
    "token_age_max": "the age of the oldest (rollout.steps_ahead)",
    "continued_share": "share of the responses that were cut off and continued (rollout.partial_tokens)",
    "continuations": "mean number of continuations of these",
    "responses_unfinished": "unfinished responses that wait for the next step",
    "prompts_drawn": "prompts drawn since the run began; each is trained, dropped or waits",
    "prompts_trained": "of these, trained on",
    "prompts_dropped": "of these, dropped by a rule (rollout.group_filter)",
    "prompts_waiting": "of these, drawn for later steps (rollout.steps_ahead)",
    "eval/accuracy": "held-out accuracy of sampled responses (avg@k), mean over benchmarks",
    "eval/accuracy_stderr": "its standard error, clustered by prompt",
    "eval/accuracy_low": "lower end of its 95 % interval (bootstrap over prompts)",
    "eval/accuracy_high": "upper end",
    "eval/greedy_accuracy": "held-out accuracy of greedy responses, mean over benchmarks",
    "eval/greedy_accuracy_stderr": "its standard error over prompts; `_low` and `_high` are the ends of its 95 % interval",
    "eval/response_length": "mean held-out response length, tokens",
    "eval/truncated": "share of held-out responses that hit the length limit",
    "time/refit": "seconds spent on sending the student's weights to the engines",
    "time/rollout": "seconds spent sampling",
    "time/reward": "seconds spent verifying",
    "time/teacher": "seconds spent on the teacher",
    "time/train": "seconds spent on the student's updates",
    "time/head": "of time/train, seconds in the output head (of the rank that spends most)",
    "time/step": "seconds of the whole step",
    "time/evaluation": "seconds of the evaluation after the step, including its refit",
    "time/head_share": "time/head as a share of time/train",
    "time/tflops": "TFLOP/s of each rank in the student's updates, by what the model needs (no recomputation, no padding)",
    "memory/refit": "on CUDA: peak memory of rank 0's tensors during the refit, GiB",
    "memory/rollout": "the same while sampling",
    "memory/reward": "while verifying",
    "memory/teacher": "while the teacher scored",
    "memory/train": "during the student's updates",
    "time/mfu": "the same as a share of the GPU's peak (cluster.peak_tflops, or that of a GPU in conf/cluster)",
}
"""The metrics that the trainer writes, and their meanings. Counts and seconds are for a single step. Evaluation also writes
`eval/pass@k`, `eval/maj@k` and each benchmark's `eval/NAME/...` (`evaluation.evaluate.summarize`); several domains and teachers
also have `domain/NAME/...` and `teacher/NAME/...` (`step_metrics`)."""


class MetricsLog:
    """Appends the metrics of one run. When a run resumes, call `truncate_after` first, so that each step is there only once."""

    def __init__(self, run_dir: Path) -> None:
        """Open `run_dir/metrics.jsonl` for appending."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `metrics` as one line `{"step": step, ...}`, which is on disk when this returns.

        NaN and infinities become the strings "NaN", "Infinity" and "-Infinity": JSON has no numbers for them, and
        `read_metrics` turns them back.
        """
        row = {"step": step, **{name: _to_json(float(value)) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def truncate_after(self, step: int) -> None:
        """Remove all lines of steps after `step`, and a last line that a killed run left incomplete."""
        self._file.close()
        keep_rows(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def keep_rows(path: Path, last: int) -> None:
    """Remove from a metrics file all lines of steps after `last`, and an incomplete last line."""
    kept = [line for line, row in _complete_rows(path) if row["step"] <= last]
    write_file(path, "".join(kept))


def read_metrics(run_dir: Path, on_damage: Callable[[int], None] | None = None) -> list[dict[str, float]]:
    """The metrics of a run, one dict per step in ascending order (`step` among its keys).

    Lines of the same step (training and evaluation) are merged. A last line without a newline, which a run is still writing, is
    left out.

    Args:
        on_damage: called with the number of each line that is not a JSON object with a step; the line is then left out.

    Raises:
        DataError: `run_dir` has no `metrics.jsonl`, the file has no line or, without `on_damage`, a damaged one.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise DataError(f"{run_dir}: no {METRICS_FILE} there; name a run directory (run.dir) that has trained a step")
    steps: dict[int, dict[str, float]] = {}
    for _, row in _complete_rows(path, on_damage):
        steps.setdefault(int(row["step"]), {}).update(row)
    if not steps:
        raise DataError(f"{path}: holds no metrics yet; wait for the run's first step")
    return [steps[step] for step in sorted(steps)]


def rows_from(path: Path, offset: int) -> Iterator[tuple[dict[str, float], int]]:
    """The rows of a metrics file from byte `offset` on, each with the offset of the byte after it. The file may still be
    written: an incomplete last line is left out, as are damaged lines.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(offset)
        while (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            try:
                row = _parse(line)
            except _DAMAGE:
                continue
            yield row, offset


def _complete_rows(path: Path, on_damage: Callable[[int], None] | None = None) -> Iterator[tuple[str, dict[str, float]]]:
    """Each line that ends in a newline, with its parsed metrics."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except _DAMAGE as error:
            if on_damage is None:
                message = f"{path}, line {number}: not a JSON object of numbers with a step; repair or remove it"
                raise DataError(message) from error
            on_damage(number)
        else:
            yield line.decode() + "\n", row


_DAMAGE = (ValueError, TypeError, AttributeError, KeyError, OverflowError)


def _parse(line: bytes) -> dict[str, float]:
    row = {name: bounded(float(value)) for name, value in json.loads(line).items()}
    if not (0 <= row["step"] <= LAST_STEP and row["step"].is_integer()):
        raise ValueError("no step")
    return row


def bounded(value: float) -> float:
    """The value, or an infinity of its sign if it is beyond `LARGEST`; NaN remains NaN."""
    return math.copysign(math.inf, value) if abs(value) > LARGEST else value


def _to_json(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value

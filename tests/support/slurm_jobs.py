"""A job for a real SLURM, and its progress."""

from __future__ import annotations

from pathlib import Path

from kdrl_mcore.monitoring.metrics import read_metrics


def steps_done(run_dir: Path) -> list[int]:
    """The steps that the run's metrics have so far."""
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "metrics.jsonl").read_text():
        return []
    return [int(row["step"]) for row in read_metrics(run_dir)]


def tiny_job_on(pair: str) -> list[str]:
    """Overrides of a job that takes a few seconds, with the student, teacher and prompts of a folder."""
    return [
        "experiment=tiny_cpu",
        f"student.path={pair}/student",
        f"teacher.path={pair}/teacher",
        f"data.train={pair}/train.jsonl",
        "data.eval=null",
        "eval.at_start=false",
        "reward=exact_match",
        "rollout.prompts_per_step=4",
        "rollout.max_response_tokens=48",
        "logging.tensorboard=false",
    ]

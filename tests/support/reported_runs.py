"""Made-up run directories for the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdrl_mcore.config import load_config, save_config
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.types import Rollout


def write_run(
    run_dir: Path, *overrides: str, steps: int = 10, planned: int | None = None, teacher: bool = True, accuracy: float = 0.55
) -> Path:
    """A run of `steps` steps out of `planned`, with a configuration if there are overrides."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if overrides:
        save_config(
            load_config([*overrides, f"run.dir={run_dir}", f"trainer.steps={planned or steps}"]), run_dir / "config.yaml"
        )
    with MetricsLog(run_dir) as log:
        log.write(0, {"eval/accuracy": 0.4, "eval/greedy_accuracy": 0.7, "time/evaluation": 3.0})
        for step in range(1, steps + 1):
            metrics = {"reward": step / 10, "accuracy": step / 20, "response_length": 40.0, "entropy": 0.5, "samples": 128.0}
            metrics |= {"time/step": 0.5, "time/train": 0.2, "beta": 0.1 if teacher else 0.0, "tokens": 1000.0}
            metrics |= {"teacher_tokens": 75.0 if teacher else 0.0, "teacher_tokens_saved": 25.0 if teacher else 100.0}
            log.write(step, metrics | ({"kl": 0.02} if teacher else {}))
        log.write(steps, {"eval/accuracy": accuracy, "eval/greedy_accuracy": 0.75})
    return run_dir


def rollout(reward: float, teacher: bool = True, prompt_id: str = "p", group_id: int = 0, tokens: int = 3) -> Rollout:
    student = np.full(tokens, -1.0, dtype=np.float32)
    scores = np.linspace(-0.5, -2.0, tokens, dtype=np.float32) if teacher else None
    ids = np.arange(1, tokens + 1)
    return Rollout(
        *(prompt_id, group_id, ids, ids, student, "stop", 0, reward, reward > 0, "</script>1+1=", "2", "2"),
        teacher_log_probs=scores,
    )

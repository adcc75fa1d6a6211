"""Training runs for the tests: overrides for a small quiet run, and what a rank returns from one.

A `RankPool` runs the functions named `*_on_rank`; nothing of kdrl_mcore is imported before they run.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.reference.dense import Settings

QUIET = ("logging.progress=false", "logging.tensorboard=false", "checkpoint.every=-1")
FAST = (*QUIET, "trainer.self_test=false")
"""Without the self-test: the tests compare log-probs anyway."""
PROMPTS = ["1+2=", "what is 3*4", "x", "solve (2-1)/7", "9", "a+b", "7*7*7=", "zz"]
PROBE_LR = 2.0**14
"""The learning rate of the gradient probe: w0 - w1 is lr times the gradient. It makes that far larger than w0, so that float32
keeps the gradient's digits, and is a power of two, so that dividing by it loses none."""
OBJECTIVE_KEYS = {
    "alpha": "objective.alpha.init",
    "beta": "objective.beta.init",
    "estimator": "objective.kd.estimator",
    "placement": "objective.kd.placement",
    "mask": "objective.kd.mask",
    "denominator": "objective.kd.denominator",
    "aggregation": "objective.aggregation",
    "max_response_tokens": "rollout.max_response_tokens",
    "normalize_by_std": "objective.normalize_by_std",
    "clip_low": "objective.clip_low",
    "clip_high": "objective.clip_high",
    "correction": "objective.sampler_correction.kind",
    "correction_bound": "objective.sampler_correction.bound",
    "reference": "objective.reference_kl.coefficient",
    "reference_estimator": "objective.reference_kl.estimator",
    "temperature": "rollout.temperature",
    "top_k": "objective.kd.top_k",
    "top_k_support": "objective.kd.top_k_support",
    "top_k_tail": "objective.kd.top_k_tail",
    "combine": "objective.combine.kind",
    "signal": "objective.combine.signal",
    "agree": "objective.combine.agree",
    "differ": "objective.combine.differ",
    "modulate_clip": "objective.combine.clip",
    "bounds": "objective.combine.bounds",
    "extrapolation": "objective.combine.extrapolation",
    "token_weight": "objective.kd.token_weight.kind",
    "share": "objective.kd.token_weight.share",
    "more": "objective.kd.token_weight.more",
    "over": "objective.kd.token_weight.over",
    "first_tokens": "objective.kd.token_weight.tokens",
    "rate": "objective.kd.token_weight.rate",
    "low": "objective.kd.token_weight.low",
    "middle": "objective.kd.token_weight.middle",
    "width": "objective.kd.token_weight.width",
    "solved": "objective.kd.token_weight.solved",
    "unsolved": "objective.kd.token_weight.unsolved",
    "normalize": "objective.kd.token_weight.normalize",
    "divergence": "objective.kd.divergence",
    "jsd_beta": "objective.kd.jsd_beta",
    "entry_clip": "objective.kd.entry_clip",
    "mix": "objective.kd.mix",
    "mix_above": "objective.kd.mix_above",
    "stop_token": "objective.kd.stop_token",
    "importance": "objective.kd.importance",
    "importance_bound": "objective.kd.importance_bound",
    "importance_level": "objective.kd.importance_level",
    "control_variate": "objective.kd.control_variate",
    "correction_level": "objective.sampler_correction.level",
    "baseline": "objective.baseline",
    "policy_loss": "objective.policy_loss",
    "ratio": "objective.ratio",
    "clip_against": "objective.clip_against",
    "dual_clip": "objective.dual_clip",
    "entropy_bonus": "objective.entropy_bonus",
    "truncated": "objective.truncated",
}
"""The configuration key of each setting of the dense reference."""
PROBE = ("optimizer.name=sgd", f"optimizer.lr={PROBE_LR}", "optimizer.clip_grad=0", "trainer.steps=1")


@dataclass
class Outcome:
    """What one rank observed during a run.

    Attributes:
        code: the exit code.
        stdout, stderr: what the run printed.
        log: the messages that kdrl_mcore logged.
        found: what a hook collected.
    """

    code: int
    stdout: str
    stderr: str
    log: list[str]
    found: dict[str, Any] = field(default_factory=dict)


def objective_overrides(settings: Settings) -> list[str]:
    """The same objective as overrides."""
    values = {key: getattr(settings, name) for name, key in OBJECTIVE_KEYS.items()}
    return [f"{key}={'null' if value is None else str(value).lower()}" for key, value in values.items()]


def train_on_rank(overrides: Sequence[str]) -> Outcome:
    """`kdrl_mcore.train.main`, as the command line calls it."""
    from kdrl_mcore.cli.train import main

    return listen(lambda: main(list(overrides)))


def score_and_train_on_rank(overrides: Sequence[str]) -> Outcome:
    """Run `main`; before the first step, the student and the teacher score the replayed rollouts, each in its layout.

    `found` has "student" and "teacher", the log-probs [T] of each rollout, and "entropy", the student's.
    """
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.model.scoring import score_rollouts
    from kdrl_mcore.trainer import Trainer

    found: dict[str, Any] = {}
    run = Trainer.run

    def score_then_run(trainer: Any) -> None:
        job, config = trainer.job, trainer.config
        settings = {"temperature": config.rollout.temperature, "micro_tokens": config.batch.micro_tokens}
        rollouts = job.source.rollouts(1)
        scored = score_rollouts(job.student.parts, rollouts, **settings)
        found["student"], found["entropy"] = [list(column) for column in zip(*scored, strict=True)]
        found["teacher"] = []
        if job.teacher is not None:
            scores = job.teacher.scores_of(dict(enumerate(rollouts)), frozenset({"log_probs"}), **settings)
            found["teacher"] = [scores.log_probs[index] for index in range(len(rollouts))]
        run(trainer)

    with patch.object(Trainer, "run", score_then_run):
        outcome = train_on_rank(overrides)
    outcome.found = found
    return outcome


def score_in_parts_and_train_on_rank(overrides: Sequence[str]) -> Outcome:
    """`score_and_train_on_rank` in which the step's groups except the first arrive in parts, the last group first, as if others
    were still being sampled."""
    from kdrl_mcore.rollout.replay import ReplayedRollouts

    replay = ReplayedRollouts.rollouts

    def replay_in_parts(source: Any, step: int, on_part: Any = None) -> Any:
        rollouts = replay(source, step)
        if on_part is not None:
            for group in sorted({rollout.group_id for rollout in rollouts})[:0:-1]:
                on_part({index: rollout for index, rollout in enumerate(rollouts) if rollout.group_id == group})
        return rollouts

    with patch.object(ReplayedRollouts, "rollouts", replay_in_parts):
        return score_and_train_on_rank(overrides)


def train_scoring_early_on_rank(overrides: Sequence[str]) -> Outcome:
    """Run `main` with an engine that hands out the verified groups of each round one by one, the last one first, as servers do
    while they sample."""
    from kdrl_mcore.parallel.platform import prepare_platform

    prepare_platform()
    from kdrl_mcore.rollout.megatron import MegatronEngine
    from kdrl_mcore.rollout.source import SampledRollouts

    generate = MegatronEngine.generate
    sources: list[Any] = []
    build = SampledRollouts.__init__

    def keep(source: Any, *arguments: Any, **more: Any) -> None:
        build(source, *arguments, **more)
        sources[:] = [source]

    def generate_in_parts(engine: Any, prompts: Any, sampling: Any, on_part: Any = None) -> Any:
        rollouts = generate(engine, prompts, sampling)
        if on_part is not None:
            sources[0]._verify(rollouts)
            for group in sorted({rollout.group_id for rollout in rollouts})[::-1]:
                on_part({index: rollout for index, rollout in enumerate(rollouts) if rollout.group_id == group})
        return rollouts

    with patch.object(MegatronEngine, "generate", generate_in_parts), patch.object(SampledRollouts, "__init__", keep):
        return train_on_rank(overrides)


def listen(job: Callable[[], int]) -> Outcome:
    """Call the function and record what it returns, prints and logs."""

    class Messages(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    handler = Messages()
    logger = logging.getLogger("kdrl_mcore")
    logger.addHandler(handler)
    try:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = job()
    finally:
        logger.removeHandler(handler)
    return Outcome(code, out.getvalue(), err.getvalue(), messages)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without their times."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics_of(run)]

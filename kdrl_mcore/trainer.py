"""The loop around the iteration: resume, evaluate, train, log, save, export."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kdrl_mcore.checkpointing.checkpoint import find_checkpoint, load_checkpoint
from kdrl_mcore.checkpointing.writer import CheckpointWriter
from kdrl_mcore.config import save_config
from kdrl_mcore.convert.export import export_hf
from kdrl_mcore.errors import CheckpointError, EngineError, NumericalError, StorageError
from kdrl_mcore.evaluation.evaluate import summarize
from kdrl_mcore.evaluation.generations import Generations
from kdrl_mcore.faults import FaultInjector
from kdrl_mcore.interrupt import StopRequest
from kdrl_mcore.iteration import run_iteration
from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.alerts import AlertWatch
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.monitoring.profiler import StepProfiler
from kdrl_mcore.monitoring.progress import Progress
from kdrl_mcore.monitoring.watchdog import Watchdog, slow_ranks
from kdrl_mcore.parallel.collect import any_rank
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.rollout.vllm import VllmEngine
from kdrl_mcore.self_test import alert_thresholds, check_drift, run_self_test
from kdrl_mcore.supervised import run_supervised_iteration

logger = logging.getLogger(__name__)


class Trainer:
    """Runs a job for `trainer.steps` steps, from its latest checkpoint if there is one."""

    def __init__(self, job: Job, stop: StopRequest, watchdog: Watchdog, fault: FaultInjector) -> None:
        """Collective over the world (the rest of an interrupted checkpoint is removed).

        Args:
            stop: asked between steps; when any rank was asked to stop, all save and end.
            watchdog: is told what this rank does.
            fault: strikes where a phase begins.
        """
        self.job = job
        self.config = job.config
        self.run_dir = Path(self.config.run.dir)
        self._stop = stop
        self._watchdog = watchdog
        self._step = 0  # in progress
        self._compared = 0.0  # when the ranks' own work was last compared
        self._is_main = dist.get_rank() == 0
        self._bad_updates = 0  # skipped in a row
        self._log: MetricsLog | None = None
        self._progress: Progress | None = None
        self._alerts = AlertWatch(thresholds=alert_thresholds(self.config))
        settings = self.config.checkpoint
        self._checkpoints = CheckpointWriter(self.run_dir / "checkpoints", settings.keep, asynchronous=settings.asynchronous)
        models = (job.student, job.teacher, job.reference)
        student, teacher, reference = (model.parts.chunks if model is not None else [] for model in models)
        for chunk in (*student, *teacher, *reference):
            chunk.register_forward_pre_hook(watchdog.mark)
        if isinstance(job.engine, VllmEngine):
            job.engine.on_wait = watchdog.mark
        self._profiler = StepProfiler(self.config.trainer.profile, self.run_dir, dist.get_rank())
        self._fault = fault
        fault.models = {"rollout": student, "teacher": teacher, "train": student}

    def run(self) -> None:
        """Train to the end and export the student; or to the step in which a rank was asked to stop. Collective over the
        world."""
        self._enter("resume")
        step = self._step = self._resume()
        if self.config.trainer.self_test:
            self._enter("self-test")
            run_self_test(self.job)
        self._open_log(step)
        try:
            stopped = self._train_from(step)
            self._enter("checkpoint")
            self._checkpoints.finish()
        finally:
            if self._log is not None and self._progress is not None:
                self._progress.close()
                with suppress(OSError):  # on a full disk the line that could not be written is tried again: told already
                    self._log.close()
        if self.config.checkpoint.export_hf and not stopped:
            self._enter("export")
            self.job.student.wait_for_weights()
            with self._writing():
                export_hf(self.job.student.parts, self.job.student.source, self.run_dir / "hf")

    def _train_from(self, step: int) -> bool:
        """The loop; returns whether it ended before the last step because it was asked to stop."""
        config = self.config
        saved = step
        if step == 0 and config.eval.at_start and not any_rank(self._stop.received is not None):
            self._record(0, self._evaluate(0))
        self._watchdog.take_own_work()  # the set-up's: only steps are compared
        self._compared = time.monotonic()
        while step < config.trainer.steps:
            if any_rank(self._stop.received is not None):
                if saved < step and config.checkpoint.every >= 0:
                    self._save(step)
                self._report_stop(step)
                return True
            step = self._step = step + 1
            before = self._state(step - 1)
            try:
                self._train_step(step)
            except EngineError:
                self._save_after_engine_error(step, before, saved)
                raise
            if _is_due(step, config.checkpoint.every, config.trainer.steps):
                self._save(step)
                saved = step
            self._checkpoints.poll()
            if config.trainer.slow_ranks_every and step % config.trainer.slow_ranks_every == 0:
                self._compare_ranks()
        return False

    def _open_log(self, step: int) -> None:
        if not self._is_main:
            return
        config = self.config
        with self._writing():
            self.run_dir.mkdir(parents=True, exist_ok=True)
            save_config(config, self.run_dir / "config.yaml")
            self._log = MetricsLog(self.run_dir, config.logging.tensorboard)
            self._log.truncate_after(step if step else -1)
        self._progress = Progress(config.trainer.steps, enabled=config.logging.progress)
        self._progress.start(step)

    def _report_stop(self, step: int) -> None:
        if self._is_main:
            cause = self._stop.received or "the request of another rank"
            logger.info(
                "stopped on %s after step %d of %d: start the same command again to go on",
                cause,
                step,
                self.config.trainer.steps,
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn a full or vanished file system under the run directory into one line."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write {error.filename or self.run_dir}: {error.strerror or error}; checkpoints made before are whole: "
                "make room or mend the file system, then start the same command again"
            ) from error

    def _train_step(self, step: int) -> None:
        with self._profiler(step):
            self._run_step(step)
        with self._writing():
            self._profiler.save(step)

    def _run_step(self, step: int) -> None:
        config, clock = self.config, Clock(self._enter)
        if config.objective.kind == "sft":
            metrics = run_supervised_iteration(self.job, clock)
        else:
            rollouts, metrics = run_iteration(self.job, step, clock)
            self._enter("logging")
            if self._is_main and config.logging.rollouts:
                with self._writing():
                    write_rollouts(self.run_dir / "rollouts" / f"step_{step:06d}.jsonl", rollouts)
        if _is_due(step, config.eval.every, config.trainer.steps):
            metrics.update(self._evaluate(step))
        self._record(step, metrics)
        check_drift(config, step, metrics)
        self._count_bad_updates(step, int(metrics["skipped_updates"]))

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.job.evaluation is None:
            return {}
        job, engine = self.job, self.job.engine
        assert engine is not None and job.evaluation is not None
        self._enter("evaluation")
        job.refit()
        keeps = self._is_main and self.config.logging.rollouts
        generations = Generations(self.run_dir / "evaluation" / f"step_{step:06d}") if keeps else None
        with self._writing():
            metrics = summarize(job.evaluation.run(engine, generations))
        engine.sleep()
        return metrics

    def _enter(self, phase: str) -> None:
        """A phase begins: show it, tell the watchdog, and let happen what a test asked for."""
        if self._progress is not None:
            self._progress.phase(phase)
        self._watchdog.enter(self._step, phase)
        self._fault.strike(self._step, phase)

    def _compare_ranks(self) -> None:
        """Name the ranks that the others wait for. Collective over the world: one all-gather of a few numbers."""
        now = time.monotonic()
        seconds, self._compared = now - self._compared, now
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (socket.gethostname(), self._watchdog.take_own_work()))
        if self._is_main:
            hosts, own_work = zip(*gathered, strict=True)
            for rank, phase, own, usual in slow_ranks(own_work, seconds):
                logger.warning(
                    "step %d: rank %d on %s is slow in %s: %.1f s of own work in the last %.1f s, the median rank %.1f s",
                    *(self._step, rank, hosts[rank], phase, own, seconds, usual),
                )

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        if self._log is None or self._progress is None:
            return
        with self._writing():
            self._log.write(step, metrics)
        self._progress.update(step, metrics)
        for alert in self._alerts.observe(metrics):
            self._progress.message(f"step {step}: {alert.name}: {alert.message}")

    def _count_bad_updates(self, step: int, skipped: int) -> None:
        self._bad_updates = self._bad_updates + skipped if skipped else 0
        if skipped and self._is_main:
            logger.warning("step %d: update skipped on all ranks: a loss, gradient or log-prob was NaN or infinite", step)
        if self._bad_updates >= self.config.trainer.max_bad_updates:
            self._checkpoints.finish()
            raise NumericalError(
                f"{self._bad_updates} updates in a row were NaN or infinite (last at step {step}): lower optimizer.lr or "
                f"objective.beta, or look at {self.run_dir}/rollouts"
            )

    def _state(self, step: int) -> dict[str, Any]:
        job = self.job
        return {
            "step": step,
            "weight_version": job.student.version,
            "alpha": job.alpha.state_dict(),
            "beta": job.beta.state_dict(),
            **job.sampling_state(),
            "bad_updates": self._bad_updates,
            "alerts": self._alerts.state_dict(),
            "seed": self.config.trainer.seed,
        }

    def _save(self, step: int) -> None:
        self._enter("checkpoint")
        if self.job.student.version == 0:  # every update was skipped: nothing is learned, and the optimizer has no state yet
            return
        if self.job.next_batch is not None:
            self.job.next_batch.finish()  # it is part of the checkpoint
        self._checkpoints.save(step, self.job.student, self._state(step))

    def _save_after_engine_error(self, step: int, before: dict[str, Any], saved: int) -> None:
        """Keep what is learned. All ranks have the error, either before the step's update or in the evaluation after it."""
        updated = self.job.student.version != before["weight_version"]
        done, state = (step, self._state(step)) if updated else (step - 1, before)
        if saved < done and self.config.checkpoint.every >= 0 and self.job.student.version > 0:
            self._checkpoints.save(done, self.job.student, state)
            self._checkpoints.finish()

    def _resume(self) -> int:
        """Restore the state of the checkpoint to resume from; returns the number of steps done."""
        path = find_checkpoint(self.run_dir / "checkpoints", self.config.checkpoint.resume)
        if path is None:
            return 0
        job = self.job
        state = load_checkpoint(path, job.student)
        if state["seed"] != self.config.trainer.seed:
            raise CheckpointError(
                f"{path} was made with trainer.seed={state['seed']}, this run has {self.config.trainer.seed}: use the same seed"
            )
        job.student.version = state["weight_version"]
        job.alpha.load_state_dict(state["alpha"])
        job.beta.load_state_dict(state["beta"])
        job.load_sampling_state(state)
        self._bad_updates = state["bad_updates"]
        self._alerts.load_state_dict(state["alerts"])
        if self._is_main:
            logger.info("resumed from %s after step %d", path, state["step"])
        return int(state["step"])


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether something happens at this step: every so many steps (if positive), at the last one, or never (negative)."""
    return every >= 0 and (step == last or (every > 0 and step % every == 0))

"""The loop around the iteration: resume, evaluate, train, log, save, export."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from kdrl_mcore.checkpointing.checkpoint import load_checkpoint
from kdrl_mcore.checkpointing.writer import CheckpointWriter
from kdrl_mcore.config.derived import is_supervised
from kdrl_mcore.convert.export import export_hf
from kdrl_mcore.convert.peft_folder import export_adapters
from kdrl_mcore.errors import EngineError, NumericalError, RewardError, StorageError
from kdrl_mcore.evaluation.evaluate import summarize
from kdrl_mcore.evaluation.generations import Generations
from kdrl_mcore.iteration import run_iteration
from kdrl_mcore.job import Job
from kdrl_mcore.monitoring.alerts import AlertWatch
from kdrl_mcore.monitoring.clock import Clock
from kdrl_mcore.monitoring.drift import alert_thresholds, check_drift
from kdrl_mcore.monitoring.loggers.choice import chosen
from kdrl_mcore.monitoring.loggers.processes import RunLoggers
from kdrl_mcore.monitoring.metrics import MetricsLog
from kdrl_mcore.monitoring.profiler import StepProfiler
from kdrl_mcore.monitoring.progress import Progress
from kdrl_mcore.objective.schedules import Record
from kdrl_mcore.parallel.collect import any_rank, each_on_any_rank, from_first_rank, gather_objects
from kdrl_mcore.parallel.platform import device
from kdrl_mcore.resilience.error_line import print_last
from kdrl_mcore.resilience.faults import FaultInjector
from kdrl_mcore.resilience.interrupt import StopRequest
from kdrl_mcore.resilience.watchdog import Watchdog, slow_ranks
from kdrl_mcore.rollout.files import write_rollouts
from kdrl_mcore.run_directory.directory import RunDirectory
from kdrl_mcore.run_directory.export import ADAPTER_EXPORT
from kdrl_mcore.run_directory.start import Start
from kdrl_mcore.self_test import run_self_test
from kdrl_mcore.student.student import Student
from kdrl_mcore.supervised import run_supervised_iteration
from kdrl_mcore.teacher.recorded import check_age
from kdrl_mcore.vocab_parallel.chunk import chooses_triton

logger = logging.getLogger(__name__)


class Trainer:
    """Runs a job for `trainer.steps` steps, starting from a checkpoint if there is one."""

    def __init__(
        self, job: Job, directory: RunDirectory, start: Start, stop: StopRequest, watchdog: Watchdog, fault: FaultInjector
    ) -> None:
        """Collective over the world (an interrupted checkpoint is removed).

        Args:
            directory, start: where the run writes, and where it begins.
            stop: checked between steps; if any rank was asked to stop, all ranks save and end.
            watchdog: notified of the phase and the progress of this rank.
            fault: injected where a phase begins.
        """
        self.job = job
        self.config = job.config
        self.run_dir = Path(self.config.run.dir)
        self._directory = directory
        self._start = start
        self._stop = stop
        self._watchdog = watchdog
        self._step = 0  # in progress
        self._compared = 0.0  # when the ranks' own work was last compared
        self._saved_at = 0.0  # when the last checkpoint was begun
        self._is_main = dist.get_rank() == 0
        self._bad_updates = 0  # skipped in a row
        self._accuracy, self._best = Record(), Record()  # of the evaluations: eval/accuracy, and `checkpoint.best`
        self._is_best = False  # whether the step in progress set a record of the latter
        self._log: MetricsLog | None = None
        self._loggers: RunLoggers | None = None
        self._progress: Progress | None = None
        self._alerts = AlertWatch(thresholds=alert_thresholds(self.config))
        settings = self.config.checkpoint
        self._checkpoints = CheckpointWriter(self.run_dir / "checkpoints", settings.keep, asynchronous=settings.asynchronous)
        student, reference = job.student.parts.chunks, [] if job.reference is None else job.reference.chunks
        teacher = [] if job.teacher is None else job.teacher.chunks
        for chunk in {*student, *teacher, *reference}:
            chunk.register_forward_pre_hook(watchdog.mark)
        self._profiler = StepProfiler(self.config.trainer.profile, self.run_dir, dist.get_rank())
        self._fault = fault
        self._chunks_at_work = {"rollout": student, "teacher": teacher, "train": student}

    def run(self) -> None:
        """Train to the end and export the student, or stop after the step in which a rank was asked to stop. Collective over
        the world."""
        if self._is_main and chooses_triton(device()):
            logger.info("the first passes compile the kernels of the output head and of activations: up to some minutes, once")
        self._enter("resume")
        step = self._step = self._resume()
        if self.config.trainer.self_test:
            self._enter("self-test")
            run_self_test(self.job)
        self._open_log(step)
        stopped: bool | None = None  # stays None if an error ends the run
        try:
            stopped = self._train_from(step)
            self._enter("checkpoint")
            self._checkpoints.finish()
        finally:
            if self._log is not None and self._progress is not None:
                self._progress.close()
                with suppress(OSError):  # on a full disk, closing retries the line that failed; that error is reported already
                    self._log.close()
            if self._loggers is not None:
                self._loggers.close(failed=stopped is None, on_wait=self._watchdog.mark)
        if self.config.checkpoint.export_hf and not stopped:
            self._enter("export")
            export_student(self.job.student, self._directory, self._start, self._step)

    def _train_from(self, step: int) -> bool:
        """The loop; returns whether it ended before the last step because it was asked to stop."""
        config = self.config
        saved = step
        evaluates_only = config.trainer.steps == 0
        if (evaluates_only or (step == 0 and config.eval.at_start)) and not any_rank(self._stop.received is not None):
            self._record(step, self._evaluate(step))
        self._watchdog.take_own_work()  # the set-up's: only steps are compared
        self._compared = self._saved_at = time.monotonic()
        if self._ends_early(step):
            return False
        while step < config.trainer.steps:
            stops, long_ago = each_on_any_rank([self._stop.received is not None, self._is_main and self._saved_long_ago()])
            if (stops or long_ago) and saved < step and config.checkpoint.every >= 0:
                self._save(step)
                saved = step
            if stops:
                self._report_stop(step)
                return True
            step = self._step = step + 1
            before = self._state(step - 1)
            self._is_best = False
            try:
                self._train_step(step)
            except (EngineError, RewardError):
                self._save_after_error(step, before, saved)
                raise
            ends_early = self._ends_early(step)
            if _is_due(step, config.checkpoint.every, step if ends_early else config.trainer.steps) or self._is_best:
                self._save(step)
                saved = step
            if ends_early:
                return False
            self._checkpoints.poll()
            if config.trainer.slow_ranks_every and step % config.trainer.slow_ranks_every == 0:
                self._compare_ranks()
        return False

    def _ends_early(self, step: int) -> bool:
        """Whether accuracy has not risen for `trainer.stop_after` evaluations; if so, logs it."""
        patience = self.config.trainer.stop_after
        if not patience or self._accuracy.waited < patience:
            return False
        assert self._accuracy.highest is not None
        if self._is_main:
            logger.info(
                "ended after step %d: %d evaluations brought no accuracy above %.1f %% (trainer.stop_after)",
                *(step, self._accuracy.waited, 100 * self._accuracy.highest),
            )
        return True

    def _open_log(self, step: int) -> None:
        if not self._is_main:
            return
        config = self.config
        with writing(self.run_dir):
            self._directory.begin(self._start)
            self._log = MetricsLog(self.run_dir)
            self._log.truncate_after(step if step else -1)
            self._loggers = RunLoggers(self.run_dir, chosen(config.logging), step)
        self._progress = Progress(config.trainer.steps, enabled=config.logging.progress)
        self._progress.start(step)

    def _saved_long_ago(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed, by this rank's clock. Only rank 0's answer is used."""
        minutes = self.config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes

    def _report_stop(self, step: int) -> None:
        """Report where the run stopped, once its checkpoint is written."""
        self._enter("checkpoint")
        self._checkpoints.finish()
        if self._is_main:
            what_next = "start the same command again to resume"
            if self.config.checkpoint.every < 0:
                what_next = "nothing is saved (checkpoint.every=-1)"
            print_last(f"{self._stop.reason} after step {step} of {self.config.trainer.steps}: {what_next}")

    def _train_step(self, step: int) -> None:
        with self._profiler(step):
            self._run_step(step)
        with writing(self.run_dir):
            self._profiler.save(step)

    def _run_step(self, step: int) -> None:
        config, clock = self.config, Clock(self._enter)
        if is_supervised(config.objective):
            metrics = run_supervised_iteration(self.job, step, clock)
        else:
            rollouts, metrics = run_iteration(self.job, step, clock)
            self._enter("logging")
            if self._is_main and config.logging.rollouts:
                with writing(self.run_dir):
                    sampled = [rollout for rollout in rollouts if not rollout.given]
                    write_rollouts(self.run_dir / "rollouts" / f"step_{step:06d}.jsonl", sampled)
        finite = not any_rank(not self.job.student.weights_are_finite())
        if finite and _is_due(step, config.eval.every, config.trainer.steps):
            metrics.update(self._evaluate(step))
        self._record(step, metrics)
        if not finite:
            self._refuse_weights(step)
        check_drift(config, step, metrics)
        check_age(config, step, metrics)
        self._count_bad_updates(step, int(metrics["skipped_updates"]))

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.job.evaluation is None:
            return {}
        job, engine = self.job, self.job.engine
        assert engine is not None and job.evaluation is not None
        self._enter("evaluation")
        start = time.perf_counter()
        job.source.prepare_refit()
        engine.refit(job.student)
        keeps = self._is_main and self.config.logging.rollouts
        generations = Generations(self.run_dir / "evaluation" / f"step_{step:06d}") if keeps else None
        with writing(self.run_dir):
            metrics = summarize(job.evaluation.run(engine, generations))
        engine.sleep()
        metrics = from_first_rank(metrics)
        for coefficient in (job.alpha, job.beta, *job.shares.values()):
            coefficient.observe(metrics["eval/accuracy"])
        self._accuracy.observe(metrics["eval/accuracy"])
        if self.config.checkpoint.best is not None:
            self._is_best = self._best.observe(metrics[self.config.checkpoint.best])
        return {**metrics, "time/evaluation": time.perf_counter() - start}

    def _enter(self, phase: str) -> None:
        """Begin a phase: show it, notify the watchdog, and inject the configured fault, if any."""
        if self._progress is not None:
            self._progress.phase(phase)
        self._watchdog.enter(self._step, phase)
        self._fault.strike(self._step, phase, self._chunks_at_work.get(phase, ()))

    def _compare_ranks(self) -> None:
        """Name the ranks that the others wait for. Collective over the world: one all-gather of a few numbers."""
        now = time.monotonic()
        seconds, self._compared = now - self._compared, now
        gathered = gather_objects((socket.gethostname(), self._watchdog.take_own_work()))
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
        self._directory.check()
        with writing(self.run_dir):
            self._log.write(step, metrics)
        if self._loggers is not None:
            self._loggers.update()
        self._progress.update(step, metrics)
        for alert in self._alerts.observe(metrics):
            self._progress.message(f"step {step}: {alert.name}: {alert.message}")

    def _count_bad_updates(self, step: int, skipped: int) -> None:
        self._bad_updates = self._bad_updates + skipped if skipped else 0
        if skipped and self._is_main:
            logger.warning("step %d: update skipped on all ranks: a loss, gradient or log-prob was NaN or infinite", step)
        if self._bad_updates >= self.config.trainer.max_bad_updates:
            if self.config.checkpoint.every >= 0:
                self._save(step)
            self._checkpoints.finish()
            raise NumericalError(
                f"{self._bad_updates} updates in a row were NaN or infinite (last at step {step}); the weights before them are "
                f"in {self._checkpoints.latest or 'no checkpoint'}: lower optimizer.lr or objective.beta, look at "
                f"{self.run_dir}/rollouts, or go back to an earlier checkpoint (checkpoint.resume)"
            )

    def _refuse_weights(self, step: int) -> NoReturn:
        """Raise: NaN or infinite weights are neither saved nor exported, and the existing checkpoints hold finite ones."""
        self._checkpoints.finish()
        raise NumericalError(
            f"the update of step {step} made weights NaN or infinite, from a finite loss and gradient; they are not saved: "
            "lower optimizer.lr or raise optimizer.adam_eps, then start again; the run resumes from "
            f"{self._checkpoints.latest or 'the beginning, as it has no checkpoint yet'}"
        )

    def _state(self, step: int) -> dict[str, Any]:
        job = self.job
        return {
            "step": step,
            "weight_version": job.student.version,
            "alpha": job.alpha.state_dict(),
            "beta": job.beta.state_dict(),
            "shares": {name: share.state_dict() for name, share in job.shares.items()},
            **job.source.state_dict(),
            "bad_updates": self._bad_updates,
            "records": {"accuracy": asdict(self._accuracy), "best": asdict(self._best)},
            "alerts": self._alerts.state_dict(),
            "seed": self.config.trainer.seed,
            "config": asdict(self.config),
            "fingerprints": self._start.fingerprints,
            "lineage": self._start.lineage.as_json(),
        }

    def _save(self, step: int) -> None:
        self._enter("checkpoint")
        if self.job.student.version == 0:  # every update was skipped: nothing was learned, and the optimizer has no state yet
            return
        self.job.source.finish()  # what it samples ahead is part of the checkpoint
        self._saved_at = time.monotonic()
        # Weights from which only NaN has followed so far must not displace those from which updates did.
        prunes = self._bad_updates == 0
        self._checkpoints.save(step, self.job.student, self._state(step), is_best=self._is_best, prunes=prunes)

    def _save_after_error(self, step: int, before: dict[str, Any], saved: int) -> None:
        """Save what was learned. All ranks have the error, either before the step's update or in the evaluation after it."""
        updated = self.job.student.version != before["weight_version"]
        done, state = (step, self._state(step)) if updated else (step - 1, before)
        if saved < done and self.config.checkpoint.every >= 0 and self.job.student.version > 0:
            self._checkpoints.save(done, self.job.student, state)
            self._checkpoints.finish()

    def _resume(self) -> int:
        """Restore the state of the checkpoint to resume from; returns the number of completed steps."""
        start, job = self._start, self.job
        if start.checkpoint is None:
            return 0
        state = load_checkpoint(start.checkpoint, job.student)
        job.student.continue_from(state["weight_version"])
        measures_anew = "accuracy" in start.restarted
        for name, coefficient in (("alpha", job.alpha), ("beta", job.beta)):
            coefficient.load_state_dict(state[name], restart=name in start.restarted, measures_anew=measures_anew)
        saved = state.get("shares", {})  # none of a teacher that is new: its schedule begins now
        for name in saved.keys() & job.shares.keys():
            restart = f"teachers.{name}.share" in start.restarted
            job.shares[name].load_state_dict(saved[name], restart=restart, measures_anew=measures_anew)
        job.source.load_state_dict(state, resamples=start.resamples)
        bad = state["bad_updates"]
        ended_run = bad >= self.config.trainer.max_bad_updates  # if so, the run may now try again
        self._bad_updates = 0 if ended_run else bad
        records = {name: Record(**of) for name, of in state.get("records", {}).items() if name not in start.restarted}
        self._accuracy, self._best = (records.get(name, Record()) for name in ("accuracy", "best"))  # none in those of 0.2
        self._alerts.load_state_dict(state["alerts"])
        if self._is_main:
            logger.info("resumed from %s after step %d", start.checkpoint, start.step)
            for line in start.changes:
                logger.info("%s", line)
        return start.step


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn an error of the file system under the run directory (full, or gone) into a one-line StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or run_dir}: {error.strerror or error}; earlier checkpoints are intact: "
            "free disk space or repair the file system, then start the same command again"
        ) from error


def export_student(student: Student, directory: RunDirectory, start: Start, step: int) -> None:
    """Write the student after `step` to `RUN/hf`, and its adapters, if they are what was trained, to `RUN/adapter`. Collective
    over the world."""
    student.wait_for_weights()
    with writing(directory.path):
        export_hf(student.parts, student.source, directory.path / "hf")
        if student.lora is not None:
            export_adapters(student.parts, student.lora, student.source, directory.path / ADAPTER_EXPORT)
        if dist.get_rank() == 0:
            directory.exported(start, step)


def _is_due(step: int, every: int, last: int) -> bool:
    """Whether something is due at this step: every `every` steps if positive, always at the last step, never if negative."""
    return every >= 0 and (step == last or (every > 0 and step % every == 0))

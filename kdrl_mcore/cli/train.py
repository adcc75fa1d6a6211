"""Train: `kdrl-train [--ranks N] experiment=NAME key=value ...`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist

from kdrl_mcore.cli.completion import completion
from kdrl_mcore.cli.program import Program
from kdrl_mcore.config import Config, load_config
from kdrl_mcore.config.help import help_text
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.resilience.error_line import error_was_printed, print_last
from kdrl_mcore.resilience.interrupt import StopRequest

if TYPE_CHECKING:
    from kdrl_mcore.run_directory.directory import RunDirectory
    from kdrl_mcore.run_directory.start import Start

logger = logging.getLogger(__name__)

USAGE = """usage: kdrl-train [OPTION] [group=choice] [key=value] ...

--ranks N          start N ranks on this machine (on several machines: torchrun or SLURM)
--config FILE      a YAML file of keys, such as RUN/config.yaml of another run; overrides take precedence
--config-dir DIR   a folder with your own choices, such as DIR/experiment/NAME.yaml, in addition to conf/ (may be repeated)
--completion bash  print a script that completes keys and choices: source <(kdrl-train --completion bash)

Groups: experiment, objective, prompt, rollout, reward, dataset (see conf/). A value with special characters needs quotes
within the shell's: 'data.plain_template="Q: {prompt}"'; a template may also come from a file: data.plain_template=@FILE.
Every key with its default and range:

"""


def main(overrides: list[str]) -> int:
    """Run a whole training job from Hydra overrides, in the existing torch.distributed world if there is one.

    SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and SIGHUP end the run after the current step with a checkpoint, from which the same
    command resumes; a second Ctrl-C ends it at once.

    Returns:
        The exit code: 0 if the run is complete or was asked to stop, otherwise that of the error, which the first rank that
        has it prints on one line, as the last output.
    """
    if any(word in ("-h", "--help") for word in overrides):
        print(USAGE + help_text())
        return 0
    program = Program()
    if overrides[:1] in (["--completion"], ["--completion=bash"]):
        with program:
            print(completion(overrides[0].partition("=")[2] or "".join(overrides[1:2])), end="")
        return program.exit_code

    def announce(name: str) -> None:
        if error_was_printed(program.run):  # torchrun is ending the ranks without an error, which can save nothing more
            os._exit(KdrlError.exit_code)
        if os.environ.get("RANK", "0") == "0":
            more = "a second Ctrl-C" if name == signal.SIGINT.name else "Ctrl-C twice"
            sys.stderr.write(f"{name}: the run saves and ends after this step; {more} ends it at once\n")
            sys.stderr.flush()

    with StopRequest(announce, says_end=os.environ.get("LOCAL_RANK", "0") == "0") as stop, program:
        config = load_config(overrides)
        program.join(config.trainer.distributed_timeout_minutes, deterministic=config.trainer.deterministic)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for library in ("megatron", "httpx", "httpx2"):
            logging.getLogger(library).setLevel(logging.WARNING)
        _run(config, overrides, stop, program.run, program.threads)
        program.leave()
    return program.exit_code


class _StoppedEarly(Exception):
    """All ranks agree that one was asked to stop while the parts were being built."""


def _run(config: Config, overrides: list[str], stop: StopRequest, run: int, threads: str | None) -> None:
    # Megatron-Core reads torch.cuda when it is imported, so the platform is prepared first.
    from kdrl_mcore.data.hub import resolve_hub
    from kdrl_mcore.monitoring.loggers.choice import check_logger_packages
    from kdrl_mcore.parallel.collect import on_first_rank
    from kdrl_mcore.run_directory.directory import RunDirectory

    if not config.student.path:
        raise ConfigError("student.path is not set: name an HF model directory")
    on_first_rank(partial(check_logger_packages, config.logging))
    config, hub = resolve_hub(config)
    with RunDirectory(config, overrides, hub) as directory:
        _run_in(directory, config, stop, run, threads)


def _run_in(directory: RunDirectory, config: Config, stop: StopRequest, run: int, threads: str | None) -> None:
    from kdrl_mcore.build import build_job
    from kdrl_mcore.monitoring.gpu_memory import alive_by_kind, key_to_lower, out_of_memory, ran_out
    from kdrl_mcore.parallel.collect import any_rank
    from kdrl_mcore.resilience.faults import FaultInjector
    from kdrl_mcore.resilience.watchdog import Watchdog
    from kdrl_mcore.run_directory.start import choose_start
    from kdrl_mcore.trainer import Trainer

    fault = FaultInjector(config.fault, dist.get_rank())
    job = None
    try:
        with Watchdog(config.trainer.hang_timeout, run) as watchdog:

            def enter(phase: str) -> None:
                begins = phase != watchdog.phase
                watchdog.enter(0, phase)
                fault.strike(0, phase)
                if begins and any_rank(stop.received is not None):
                    raise _StoppedEarly

            try:
                enter("resume")
                start = choose_start(config)
                if start.is_complete:
                    _finish(directory, config, start, enter)
                    return
                job = build_job(config, enter, watchdog.mark)
                if threads is not None and dist.get_rank() == 0:
                    logger.info(threads)
                Trainer(job, directory, start, stop, watchdog, fault).run()
            except _StoppedEarly:
                if dist.get_rank() == 0:
                    print_last(f"{stop.reason} before the first step: nothing was trained yet")
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                where = f"step {watchdog.step}, {watchdog.phase}"
                models = {} if job is None else {"teacher": job.teacher, "reference": job.reference}
                alive = alive_by_kind(None if job is None else job.student, models)
                advice = key_to_lower(config, watchdog.phase)
                raise out_of_memory(error, where, dist.get_rank(), alive, advice) from None
    finally:
        if job is not None:
            job.close()


def _finish(directory: RunDirectory, config: Config, start: Start, enter: Callable[[str], None]) -> None:
    """Finish a run whose last step is trained: export the student, unless it was exported. Collective over the world."""
    from kdrl_mcore.checkpointing.checkpoint import load_checkpoint
    from kdrl_mcore.data.vocabulary import shared_vocabulary
    from kdrl_mcore.student.student import Student
    from kdrl_mcore.trainer import export_student, writing

    if start.exports:
        assert config.student.path is not None and start.checkpoint is not None
        enter("load student")
        _, vocab_size = shared_vocabulary(config.student.path)
        student = Student(config, dist.get_world_size(), vocab_size, lambda: enter("load student"))
        load_checkpoint(start.checkpoint, student)
        if dist.get_rank() == 0:
            with writing(directory.path):
                directory.begin(start)
        enter("export")
        export_student(student, directory, start, start.step)
    if dist.get_rank() == 0:
        logger.info("the run is complete: step %d of %d, from %s", start.step, config.trainer.steps, start.checkpoint)

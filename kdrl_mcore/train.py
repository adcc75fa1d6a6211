"""Train: `torchrun --nproc-per-node N -m kdrl_mcore.train experiment=NAME key=value ...` (or plain python for one rank)."""

from __future__ import annotations

import itertools
import logging
import os
import sys

import torch.distributed as dist

from kdrl_mcore.config import Config, load_config
from kdrl_mcore.config_help import help_text
from kdrl_mcore.errors import KdrlError
from kdrl_mcore.interrupt import StopRequest
from kdrl_mcore.parallel.platform import destroy_groups, initialize_distributed, prepare_platform

USAGE = """usage: torchrun --nproc-per-node N -m kdrl_mcore.train [group=choice] [key=value] ...

Groups: experiment, objective, prompt, rollout, reward (see conf/). Every key with its default:

"""
_runs = itertools.count()  # runs of this process: the same number on every rank


def main(overrides: list[str]) -> int:
    """Run a whole training job from Hydra overrides, in the existing torch.distributed world if there is one.

    SIGTERM and SIGUSR1 end the run after the step they come in, with a checkpoint from which the same command goes on.

    Returns:
        The exit code: 0 for a run that is complete or was asked to stop, or that of the error, which is printed on one line
        by the first rank that has it. A rank without the error may wait for the others in a collective; torchrun ends it.
    """
    run = next(_runs)
    if any(word in ("-h", "--help") for word in overrides):
        print(USAGE + help_text())
        return 0
    with StopRequest() as stop:
        return _train(overrides, stop, run)


def _train(overrides: list[str], stop: StopRequest, run: int) -> int:
    try:
        config = load_config(overrides)
        prepare_platform(config.trainer.deterministic)
        created = initialize_distributed(config.trainer.distributed_timeout_minutes)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for library in ("megatron", "httpx"):
            logging.getLogger(library).setLevel(logging.WARNING)
        kept = set() if created else set(dist.distributed_c10d._world.pg_map)
        _run(config, stop, run)
    except KdrlError as error:
        if _is_first(run):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if created:
        dist.destroy_process_group()
    else:
        destroy_groups(kept)
    return 0


def _run(config: Config, stop: StopRequest, run: int) -> None:
    # Megatron-Core reads torch.cuda when it is imported, so the platform comes first.
    from kdrl_mcore.faults import FaultInjector
    from kdrl_mcore.job import build_job
    from kdrl_mcore.monitoring.gpu_memory import alive_by_kind, key_to_lower, out_of_memory, ran_out
    from kdrl_mcore.monitoring.watchdog import Watchdog
    from kdrl_mcore.trainer import Trainer

    fault = FaultInjector(config.fault, dist.get_rank())
    job = None
    try:
        with Watchdog(config.trainer.hang_timeout, run) as watchdog:

            def enter(phase: str) -> None:
                watchdog.enter(0, phase)
                fault.strike(0, phase)

            try:
                job = build_job(config, enter)
                Trainer(job, stop, watchdog, fault).run()
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


def _is_first(run: int) -> bool:
    """Whether no rank has reported an error of this run yet. Before there is a world, every rank has the same error."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    return dist.distributed_c10d._get_default_store().add(f"kdrl_mcore/errors/{run}", 1) == 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The frame of a program that runs on all ranks: join the world, run, print an error once, leave the world as it was."""

from __future__ import annotations

import argparse
import itertools
import os
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.parallel.platform import choose_threads, destroy_groups, initialize_distributed, prepare_platform
from kdrl_mcore.resilience.error_line import error_was_printed, print_error

_runs = itertools.count()  # programs that this process has run: the same number on every rank


class Program:
    """One run of a program in the job's world. A context manager, entered by all ranks; `exit_code` is what to return after it.

    A `KdrlError` raised inside is not propagated: the first rank that has it prints it on one line, as the last output. A rank
    without the error may wait for the others in a collective until that fails or torchrun ends the rank; what it raises then is
    not printed. All other exceptions propagate.

    Attributes:
        run: the number of this run, the same on every rank.
        created: whether `join` created the world.
        threads: a log line with the number of threads of each rank; None on CUDA, or if the world existed before.
        exit_code: 0, or the exit code of the error.
    """

    def __init__(self) -> None:
        self.run = next(_runs)
        self.created = False
        self.threads: str | None = None
        self.exit_code = 0
        self._kept: set[object] = set()

    def join(self, timeout_minutes: int, *, deterministic: bool = False) -> None:
        """Prepare this process for Megatron-Core, and join the world. Collective over it.

        Args:
            timeout_minutes: the time-out of collectives.
            deterministic: whether torch should use deterministic kernels.
        """
        prepare_platform(deterministic)
        self.created = initialize_distributed(timeout_minutes)
        if self.created:
            self.threads = choose_threads()
        self._kept = set(dist.distributed_c10d._world.pg_map)

    def leave(self) -> None:
        """Destroy the process groups created since `join`. Collective over the world if it existed before `join`."""
        if self.created:
            dist.destroy_process_group()
            self.created = False
        else:
            destroy_groups(self._kept)
        self._kept = set()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, KdrlError):
            print_error(error, self.run)
            self.exit_code = error.exit_code
        elif isinstance(error, Exception) and error_was_printed(self.run):
            self.exit_code = KdrlError.exit_code
        # After an error the world ends with its processes: others may still wait in it for this rank.
        if self.created and error is None and dist.is_initialized():
            dist.destroy_process_group()
        return self.exit_code != 0


class _StartsRanks(argparse.Action):
    """`kdrl_mcore.cli.commands` removes `--ranks N` before a program starts; here the option exists only for --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parser.error("write --ranks N in full")


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """Add `--ranks` to the help; `kdrl_mcore.cli.commands` handles it."""
    text = "start N ranks on this machine (on several machines: torchrun or SLURM)"
    parser.add_argument("--ranks", metavar="N", action=_StartsRanks, help=text)


class Options(argparse.ArgumentParser):
    """Options of a program that runs on all ranks. A wrong option raises ConfigError, which is printed only once."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError, where argparse would print its usage and exit."""
        raise ConfigError(f"{message} (--help lists the options)")


def is_first_rank() -> bool:
    """Whether this is rank 0 of the job; works before the world is initialised, too."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"

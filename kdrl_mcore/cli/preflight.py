"""Preflight: find in the first minute what would end a job after an hour, on the same ranks that will train.

    kdrl-preflight [--ranks N] [--min-bandwidth GB/s] [key=value ...]       the overrides of kdrl-train

All checks run and all failures are listed; the exit code is 1 if there are any. Nothing is trained, and no weights are read
except a head that is stored along with tied embeddings.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from kdrl_mcore.cli.program import Options, Program, add_ranks_option
from kdrl_mcore.config import add_config_options, config_arguments, load_config
from kdrl_mcore.config.ranges import RATE, check_number
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.resilience.error_line import print_last

LEAST_DEFAULT_BANDWIDTH = 10.0
"""The default minimum of the all-reduce bandwidth between GPUs, GB/s."""


def main(arguments: list[str]) -> int:
    """Run every check in the job's world; rank 0 prints the report."""
    parser = Options(prog="kdrl-preflight", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--min-bandwidth",
        default="auto",
        help="GB/s of all-reduce below which the check fails; auto is 10 with GPUs and 0 without (default: %(default)s)",
    )
    add_ranks_option(parser)
    add_config_options(parser)
    failed = False
    with Program() as program:
        options = parser.parse_intermixed_args(arguments)
        from kdrl_mcore.preflight.checks import run_checks  # its imports take seconds

        config = load_config(config_arguments(options))
        program.join(timeout_minutes=5)
        findings = run_checks(config, _least_bandwidth(options.min_bandwidth))
        errors = [f"error: preflight, {finding.name}: {finding.text}" for finding in findings if not finding.good]
        if dist.get_rank() == 0:
            for finding in findings:
                print(f"{'ok  ' if finding.good else 'FAIL'}  {finding.name:<12} {finding.text}", flush=True)
            if errors:
                print_last("\n".join(errors))
        dist.barrier()  # torchrun ends rank 0 as soon as another rank has failed
        failed = bool(errors)
    return program.exit_code or int(failed)


def _least_bandwidth(text: str) -> float:
    if text == "auto":
        return LEAST_DEFAULT_BANDWIDTH if torch.cuda.is_available() else 0.0
    try:
        least = float(text)
    except ValueError as error:
        raise ConfigError(f"--min-bandwidth={text} is not a number of GB/s") from error
    check_number("--min-bandwidth", least, RATE)
    return least

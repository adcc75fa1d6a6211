"""All checks of a preflight, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import engines_share_gpus
from kdrl_mcore.preflight import configuration, machine
from kdrl_mcore.preflight.findings import Finding, find


def run_checks(config: Config, min_bandwidth: float) -> list[Finding]:
    """The finding of every check, the same list on every rank. Collective over the world."""
    checks: dict[str, Callable[[], str]] = {
        "versions": lambda: machine.check_versions(config),
        "devices": lambda: machine.check_devices(config),
        "hub": lambda: configuration.check_hub(config),
        "models": lambda: configuration.check_models(config),
        "layout": lambda: configuration.check_layout(config),
        "engines": lambda: configuration.check_engines(config),
        "data": lambda: configuration.check_data(config),
        "lengths": lambda: configuration.check_lengths(config),
        "memory": lambda: configuration.check_memory(config),
        "loggers": lambda: configuration.check_loggers(config),
        "run.dir": lambda: machine.check_run_dir(Path(config.run.dir)),
        "all-reduce": lambda: machine.check_all_reduce(min_bandwidth),
    }
    if engines_share_gpus(config.rollout):
        checks["vllm"] = machine.check_vllm
    return [find(name, check) for name, check in checks.items()]

"""All checks of a preflight, in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import engines_share_gpus
from kdrl_mcore.data.hub import resolve_models
from kdrl_mcore.errors import ModelError
from kdrl_mcore.preflight import configuration, machine
from kdrl_mcore.preflight.findings import Finding, find


def run_checks(config: Config, min_bandwidth: float) -> list[Finding]:
    """The finding of every check, the same list on every rank. Collective over the world."""
    findings = [
        find("versions", lambda: machine.check_versions(config)),
        find("devices", lambda: machine.check_devices(config)),
    ]
    found, hub = _find_models(config)
    checks: dict[str, Callable[[], str]] = {
        "models": lambda: configuration.check_models(found),
        "layout": lambda: configuration.check_layout(found),
        "engines": lambda: configuration.check_engines(found),
        "teachers": lambda: configuration.check_teachers(found),
        "data": lambda: configuration.check_data(found),
        "lengths": lambda: configuration.check_lengths(found),
        "memory": lambda: configuration.check_memory(found),
        "loggers": lambda: configuration.check_loggers(found),
        "run.dir": lambda: machine.check_run_dir(Path(found.run.dir)),
        "all-reduce": lambda: machine.check_all_reduce(min_bandwidth),
    }
    if engines_share_gpus(found.rollout):
        checks["vllm"] = machine.check_vllm
    return [*findings, hub, *(find(name, check) for name, check in checks.items())]


def _find_models(config: Config) -> tuple[Config, Finding]:
    """The configuration with the folders of the models that are named by a hub id, which are downloaded once on each node, or
    the same configuration if that fails. Collective over the world."""
    try:
        found, commits = resolve_models(config)
    except ModelError as error:  # on every rank
        return config, Finding("hub", False, str(error))
    text = ", ".join(f"{key} {model}" for key, model in commits.items()) or "no model by hub id"
    return found, Finding("hub", True, text)

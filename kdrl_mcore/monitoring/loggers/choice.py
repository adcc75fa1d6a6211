"""The choice of a run's loggers, and the check that they are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from kdrl_mcore.config import LoggingConfig
from kdrl_mcore.errors import ConfigError
from kdrl_mcore.monitoring.loggers.interface import LoggedRun, Logger

BUILT_IN = {
    "tensorboard": ("kdrl_mcore.monitoring.loggers.tensorboard:TensorBoardLogger", "tensorboard", "tensorboard"),
    "wandb": ("kdrl_mcore.monitoring.loggers.wandb:WandbLogger", "wandb", "wandb"),
    "mlflow": ("kdrl_mcore.monitoring.loggers.mlflow:MlflowLogger", "mlflow", "mlflow-skinny"),
    "trackio": ("kdrl_mcore.monitoring.loggers.trackio:TrackioLogger", "trackio", "trackio"),
}
"""For each name: the class, the module that it needs, and the package to install."""


def chosen(settings: LoggingConfig) -> list[str]:
    """The loggers of a run: `logging.loggers`, with or without TensorBoard if `logging.tensorboard` is set."""
    others = [name for name in settings.loggers if name != "tensorboard"]
    with_tensorboard = "tensorboard" in settings.loggers if settings.tensorboard is None else settings.tensorboard
    return [*(["tensorboard"] if with_tensorboard else []), *others]


def check_logger_packages(settings: LoggingConfig) -> list[str]:
    """The loggers of a run, after checking that each can be imported here. No logger is imported.

    Raises:
        ConfigError: a logger's package is missing.
    """
    names = chosen(settings)
    for name in names:
        module, package = BUILT_IN[name][1:] if name in BUILT_IN else (name.partition(":")[0], None)
        try:
            spec = find_spec(module)
        except ModuleNotFoundError:  # of the parent package
            spec = None
        if spec is None or spec.origin is None:  # without an origin it is a folder such as ./wandb, which holds runs
            install = f"pip install {package} (or 'kdrl-mcore[loggers]')" if package else f"put {module} on the PYTHONPATH"
            raise ConfigError(f"logging.loggers: {name} is not installed: {install}, or leave {name} out")
    return names


def class_of(name: str) -> Callable[[LoggedRun], Logger]:
    """The class of a logger; imports its module."""
    module, _, attribute = (BUILT_IN[name][0] if name in BUILT_IN else name).partition(":")
    return getattr(import_module(module), attribute)

"""Composing the configuration with Hydra, and saving it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kdrl_mcore.config.checks import (
    check_config,
    flatten,
)
from kdrl_mcore.config.schema import (
    BenchmarkConfig,
    Config,
)
from kdrl_mcore.errors import ConfigError


def conf_dir() -> Path:
    """The folder of Hydra's YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def load_config(overrides: Sequence[str]) -> Config:
    """Compose the configuration from `conf/` and command-line overrides (`key=value`, `group=choice`), and check it.

    Raises:
        ConfigError: an unknown key (naming the nearest one), an unknown group choice, or a value of the wrong type.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = compose("config", overrides=list(overrides))
        config = OmegaConf.to_object(composed)
        assert isinstance(config, Config)
        check_config(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def load_benchmark(name: str) -> BenchmarkConfig:
    """The benchmark that `conf/benchmark/NAME.yaml` describes.

    Raises:
        ConfigError: there is none of that name (naming the nearest), or its file is wrong.
    """
    folder = conf_dir() / "benchmark"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"eval.benchmarks: no such benchmark '{name}'; there are: {', '.join(known)}{_nearest(name, known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), OmegaConf.load(folder / f"{name}.yaml"))
        benchmark = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{folder / name}.yaml: {' '.join(str(error).split())}") from error
    assert isinstance(benchmark, BenchmarkConfig)
    return benchmark


def _explain(error: Exception, overrides: Sequence[str]) -> ConfigError:
    """One line for a Hydra or OmegaConf error, naming the nearest key or choice where the override's name is unknown."""
    keys = list(flatten(asdict(Config())))
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir() and path.name != "experiments"]
    sections = {key.split(".")[0] for key in keys}
    for override in overrides:
        if "=" not in override:
            return ConfigError(f"'{override}' is not an override: write key=value or group=choice")
        name, value = override.lstrip("+~").split("=", 1)
        if name in groups:
            choices = sorted(path.stem for path in (conf_dir() / name).glob("*.yaml"))
            if value not in choices and isinstance(error, MissingConfigException):
                return ConfigError(f"{name}={value}: no such {name}; there are: {', '.join(choices)}{_nearest(value, choices)}")
        elif name not in keys and not any(key.startswith(f"{name}.") for key in keys):
            return ConfigError(f"unknown configuration key '{name}'{_nearest(name, [*keys, *sections, *groups])}")
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    return ConfigError(" ".join(str(cause).split()))


def _nearest(word: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean '{matches[0]}'?" if matches else ""

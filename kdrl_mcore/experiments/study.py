"""Studies: a grid of settings x seeds over a pair of models, read from `conf/experiments/*.yaml`, as a list of runs.

A study names a `base` (the pair, in `conf/experiments/base/`), `seeds`, and a `grid` of axes; each choice of an axis is a list
of training overrides. The grid's product, with every seed, gives the runs. `${times:2e-3,${scale}}` multiplies.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdrl_mcore.config import Config, flatten, load_config
from kdrl_mcore.errors import ConfigError

OWN_KEYS = ("base", "seeds", "root")
"""What the command line can set of the study itself; every other key is an override of the runs' configuration."""
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        study, setting: the study's name, and the chosen name on each axis, such as ("kdrl",).
        seed: `trainer.seed`.
        overrides: what `kdrl_mcore.train` is called with, besides `run.dir`.
        identity: hash of the resolved configuration; studies that hold the same configuration share the run.
        root, label: the folder of all runs, and a readable name for this one's in it.
        steps, ranks, nodes: its length; its processes on each of its machines.
    """

    study: str
    setting: tuple[str, ...]
    seed: int
    overrides: tuple[str, ...]
    identity: str
    root: Path
    label: str
    steps: int
    ranks: int
    nodes: int

    @property
    def name(self) -> str:
        """For people: `kdrl weak, seed 3`."""
        return f"{' '.join(self.setting)}, seed {self.seed}"

    @property
    def directory(self) -> Path:
        """Where it lives: what any study made of this identity, under whatever name, else one by its own label."""
        return min(self.root.glob(f"*-{self.identity}"), default=self.root / f"{self.label}-{self.identity}")


def load_study(path: Path, arguments: Sequence[str] = ()) -> list[Run]:
    """The runs of a study, every setting with its first seed before any with its second: a grid that is cut short stays fair.

    Args:
        arguments: `key=value` from the command line: `OWN_KEYS`, keys of the base file, or overrides of every run.

    Raises:
        ConfigError: a file that is missing or wrong, or an override that training would refuse.
    """
    OmegaConf.register_new_resolver("times", lambda a, b: f"{float(a) * float(b):.12g}", replace=True)
    study = _read(path)
    own, overrides = _split(arguments)
    base_name = own.get("base", study.get("base"))
    if not base_name:
        raise ConfigError(f"{path}: names no base; set base=NAME, a file in {path.parent / 'base'}")
    base_path = path.parent / "base" / f"{base_name}.yaml"
    base = _read(base_path)
    own |= {key: value for key, value in overrides.items() if key in base}
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.merge(base, study, OmegaConf.create(own)), resolve=True)
        axes, root, seeds = tree["grid"], Path(tree["root"]), [int(seed) for seed in tree["seeds"]]
        if not axes or not all(isinstance(choice, list) for axis in axes.values() for choice in axis.values()):
            raise ConfigError(f"{path}: 'grid' must hold axes, each with named lists of overrides")
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} with {base_path}: {' '.join(str(error).split())}: grid, root and seeds are needed"
        ) from error
    extra = [f"{key}={value}" for key, value in overrides.items() if key not in own]
    common = [*tree.get("overrides", [])]
    points = [zip(*point, strict=True) for point in itertools.product(*(axis.items() for axis in axes.values()))]
    settings = [
        _runs(path.stem, root, tuple(names), seeds, [*common, *itertools.chain(*choices), *extra]) for names, choices in points
    ]
    return list(itertools.chain(*zip(*settings, strict=True)))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path} does not exist; in that folder there are: {there}")
    try:
        return dict(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    except Exception as error:  # OmegaConf passes on what the YAML reader raises
        raise ConfigError(f"{path} is not a YAML mapping: {' '.join(str(error).split())}") from error


def _split(arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    own: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in OWN_KEYS:
            own[key] = OmegaConf.from_dotlist([argument])[key]
        else:
            overrides[key] = value
    return own, overrides


def _runs(study: str, root: Path, setting: tuple[str, ...], seeds: Sequence[int], overrides: Sequence[str]) -> list[Run]:
    """One setting with each seed."""
    overrides = _last_of_each_key(overrides)
    config = load_config(overrides)
    flat, name = flatten(asdict(config)), re.sub(r"[^\w.]+", "-", "-".join(setting))
    student = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    teacher = config.teacher.parallel.tensor * config.teacher.parallel.pipeline
    nodes = config.cluster.nodes
    ranks = max(config.cluster.gpus_per_node, -(-math.lcm(student, teacher) // nodes))
    runs = []
    for seed in seeds:
        identity = identify(flat | {"trainer.seed": seed})
        own = (*overrides, f"trainer.seed={seed}")
        runs.append(Run(study, setting, seed, own, identity, root, f"{name}-seed{seed}", config.trainer.steps, ranks, nodes))
    return runs


def _last_of_each_key(overrides: Sequence[str]) -> list[str]:
    """Hydra takes each group once: a later choice replaces an earlier one."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def changed_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What of a flat configuration differs from the defaults, without the place of the run."""
    defaults = flatten(asdict(Config()))
    return {key: value for key, value in flat.items() if key != "run.dir" and value != defaults.get(key)}


def identify(flat: Mapping[str, Any]) -> str:
    """Eight hex digits of `changed_keys`: a key that the program gains later, at its default, changes no identity."""
    text = json.dumps(changed_keys(flat), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_config(run_dir: Path) -> dict[str, Any]:
    """The flat configuration of a run directory; empty where it has none."""
    path = run_dir / CONFIG_FILE
    return flatten(_read(path)) if path.is_file() else {}

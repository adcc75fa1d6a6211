"""Studies: a grid of settings x seeds over a pair of models, read from a YAML file such as those of `conf/study/`.

A study names a `base` (the pair: a file in the folder `base` next to it), `seeds`, and a `grid` of axes; each choice of an axis
is a list of training overrides. The grid's product, with every seed, gives the runs. `${times:2e-3,${scale}}` multiplies,
`${AXIS}` is the name chosen on that axis. With `planned: true` nothing is trained: each run is a plan (docs/planning.md), with
one seed and no base.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdrl_mcore.config import Config, conf_dir, flatten, load_config
from kdrl_mcore.config.derived import ranks_per_node
from kdrl_mcore.config.keys import nearest
from kdrl_mcore.errors import ConfigError

OWN_KEYS = ("base", "seeds", "root")
"""Keys of the study itself that the command line can set; every other key is an override of the runs' configuration."""
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class StudyRun:
    """One training run of a study.

    Attributes:
        study, axes, setting: the study's name, its axes, and the choice on each, such as ("method",) and ("kdrl",).
        seed: `trainer.seed`.
        overrides: the arguments of `kdrl_mcore.train` other than `run.dir`.
        identity: hash of the resolved configuration; studies with the same configuration share the run.
        root, label: the folder of all runs, and a readable name for this run's folder in it.
        steps, ranks, nodes: the number of steps, of processes per machine, and of machines.
        planned: whether the run is only planned, by one process.
    """

    study: str
    axes: tuple[str, ...]
    setting: tuple[str, ...]
    seed: int
    overrides: tuple[str, ...]
    identity: str
    root: Path
    label: str
    steps: int
    ranks: int
    nodes: int
    planned: bool

    @property
    def name(self) -> str:
        """A readable name: `kdrl weak, seed 3`."""
        return " ".join(self.setting) + ("" if self.planned else f", seed {self.seed}")

    @property
    def directory(self) -> Path:
        """The run's directory: an existing one with this identity, under any label, or else one with this run's own label."""
        return min(self.root.glob(f"*-{self.identity}"), default=self.root / f"{self.label}-{self.identity}")


def find_study(name: str) -> Path:
    """The file of a study: a path, or the name of one of the package.

    Raises:
        ConfigError: there is neither, or the path is the one that the package's studies had in version 0.1.
    """
    path, shipped = Path(name), conf_dir() / "study"
    if path.is_file():
        return path
    if path.parts[-3:-1] == ("conf", "experiments"):
        raise ConfigError(f"{name}: the studies have moved to conf/study: write {path.stem} or conf/study/{path.name}")
    known = sorted(file.stem for file in shipped.glob("*.yaml"))
    if path.parent == Path() and not path.suffix:
        if name not in known:
            raise ConfigError(f"no such study '{name}'; there are: {', '.join(known)}{nearest(name, known)}, or name a file")
        return shipped / f"{name}.yaml"
    return path


def load_study(path: Path, arguments: Sequence[str] = (), only: Mapping[str, Collection[str]] | None = None) -> list[StudyRun]:
    """The runs of a study: every setting with the first seed before any with the second, so that an interrupted grid
    compares equal numbers of seeds.

    Args:
        arguments: `key=value` from the command line: `OWN_KEYS`, keys of the base file, or overrides of every run.
        only: the choices to which axes are restricted.

    Raises:
        ConfigError: a file is missing or wrong, `only` names what the study lacks, or training would refuse an override.
    """
    OmegaConf.register_new_resolver("times", lambda a, b: f"{float(a) * float(b):.12g}", replace=True)
    study = _read(path)
    own, overrides = _split(arguments)
    base_name = own.get("base", study.get("base"))
    planned = bool(study.get("planned"))
    if not base_name and not planned:
        raise ConfigError(f"{path} names no base: set base=NAME, a file in {path.parent / 'base'}")
    base_path = path.parent / "base" / f"{base_name}.yaml"
    base = _read(base_path) if base_name else {"seeds": [1]}
    own |= {key: value for key, value in overrides.items() if key in base}
    try:
        merged = OmegaConf.merge(base, study, OmegaConf.create(own))
        axes = {str(axis): list(merged.grid[axis]) for axis in merged.grid}
        axes = {axis: _restricted(path, axis, choices, only or {}) for axis, choices in axes.items()}
        if unknown := [axis for axis in only or {} if axis not in axes]:
            raise ConfigError(f"{path} has no axis '{unknown[0]}': its axes are {', '.join(axes)}")
        points = [dict(zip(axes, names, strict=True)) for names in itertools.product(*axes.values())]
        trees = [_resolved(merged, point) for point in points]
        tree = trees[0]
        root, seeds = Path(tree["root"]), [int(seed) for seed in tree["seeds"]]
        if not axes or not all(isinstance(choice, list) for axis in tree["grid"].values() for choice in axis.values()):
            raise ConfigError(f"{path}: 'grid' must hold axes, each with named lists of overrides")
    except (OmegaConfBaseException, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        where = f"{path} with {base_path}" if base_name else f"{path}"
        raise ConfigError(f"{where}: {' '.join(str(error).split())}: grid, root and seeds are needed") from error
    extra = [f"{key}={value}" for key, value in overrides.items() if key not in own]
    settings = []
    for point, tree in zip(points, trees, strict=True):
        choices = itertools.chain(*(tree["grid"][axis][name] for axis, name in point.items()))
        settings.append(_runs(path.stem, root, point, seeds, [*tree.get("overrides", []), *choices, *extra], planned))
    return list(itertools.chain(*zip(*settings, strict=True)))


def _restricted(path: Path, axis: str, choices: Sequence[str], only: Mapping[str, Collection[str]]) -> list[str]:
    """The choices of an axis that are asked for, in the study's order."""
    wanted = only.get(axis, choices)
    for choice in wanted:
        if choice not in choices:
            raise ConfigError(
                f"{path}: '{axis}' has no choice '{choice}'; it has {', '.join(choices)}{nearest(choice, choices)}"
            )
    return [choice for choice in choices if choice in wanted]


def _resolved(merged: Any, point: Mapping[str, str]) -> dict[str, Any]:
    """A study with its interpolations resolved at a point of the grid, where `${AXIS}` is the choice on that axis; an empty
    point stands for each axis's first choice."""
    names = {axis: point.get(axis, next(iter(merged.grid[axis]), "")) for axis in merged.grid if axis not in merged}
    result: Any = OmegaConf.to_container(OmegaConf.merge(merged, names), resolve=True)
    return result


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path} does not exist; that folder holds: {there}")
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


def _runs(
    study: str, root: Path, setting: Mapping[str, str], seeds: Sequence[int], overrides: Sequence[str], planned: bool
) -> list[StudyRun]:
    """The runs of one setting, a choice on each axis, with each seed."""
    overrides = _last_of_each_key(overrides)
    config = load_config(overrides)
    flat, name = flatten(asdict(config)), re.sub(r"[^\w.]+", "-", "-".join(setting.values()))
    nodes, ranks = (1, 1) if planned else (config.cluster.nodes, ranks_per_node(config, gpus=0))
    return [
        StudyRun(
            study=study,
            axes=tuple(setting),
            setting=tuple(setting.values()),
            seed=seed,
            overrides=(*overrides, f"trainer.seed={seed}"),
            identity=identify(flat | {"trainer.seed": seed}),
            root=root,
            label=f"{name}-seed{seed}",
            steps=config.trainer.steps,
            ranks=ranks,
            nodes=nodes,
            planned=planned,
        )
        for seed in seeds
    ]


def _last_of_each_key(overrides: Sequence[str]) -> list[str]:
    """The last override of each key. Hydra accepts each group only once, so a later choice replaces an earlier one."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def changed_keys(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a flat configuration that differ from the defaults, without `run.dir`."""
    defaults = flatten(asdict(Config()))
    return {key: value for key, value in flat.items() if key != "run.dir" and value != defaults.get(key)}


def identify(flat: Mapping[str, Any]) -> str:
    """Eight hex digits, a hash of `changed_keys`: a key that is added later, at its default, changes no identity."""
    text = json.dumps(changed_keys(flat), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_config(run_dir: Path) -> dict[str, Any]:
    """The flat configuration of a run directory; empty if it has none."""
    path = run_dir / CONFIG_FILE
    return flatten(_read(path)) if path.is_file() else {}

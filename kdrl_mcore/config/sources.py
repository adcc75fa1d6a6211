"""Where a configuration comes from: the options of a command, a file of keys, and folders of choices."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdrl_mcore.config.overrides import Override, name_of, override, read_overrides
from kdrl_mcore.errors import ConfigError

NO_GROUPS = ("study", "benchmark")
"""Folders of `conf/` that contain no choices of the training configuration."""
DEFAULT_GROUPS = ("objective", "rollout", "reward", "prompt", "cluster", "experiment", "dataset")
"""The groups in `conf/config.yaml`, in its order."""
MAY_BE_LEFT_OUT = ("prompt", "cluster", "experiment", "dataset")


def conf_dir() -> Path:
    """The folder of Hydra's YAML files."""
    return _shipped("conf")


def slurm_dir() -> Path:
    """The folder of the SLURM scripts."""
    return _shipped("slurm")


def _shipped(name: str) -> Path:
    """A folder inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name


@dataclass
class Sources:
    """The sources of a configuration besides its overrides: a file of keys (`--config`), and the folders of choices, first the
    package's, then the user's (`--config-dir`, or Hydra's searchpath)."""

    file: Path | None = None
    folders: list[Path] = field(default_factory=lambda: [conf_dir()])

    def groups(self) -> list[str]:
        """The groups that have choices: the default ones, then those that only the user's folders have."""
        found = [path.name for folder in self.folders for path in sorted(folder.iterdir()) if any(path.glob("*.yaml"))]
        return list(dict.fromkeys([*DEFAULT_GROUPS, *(name for name in found if name not in NO_GROUPS)]))

    def choices(self, group: str) -> dict[str, Path]:
        """The choices of a group and their files, from all folders."""
        return {path.stem: path for folder in self.folders[::-1] for path in sorted((folder / group).glob("*.yaml"))}

    def search_path(self) -> str:
        """The override that adds the user's folders to Hydra's search path."""
        return "hydra.searchpath=[" + ",".join(override("", f"file://{folder}")[1:] for folder in self.folders[1:]) + "]"


def add_config_options(parser: argparse.ArgumentParser, metavar: str = "key=value") -> None:
    """Add the options and overrides that `load_config` takes to the parser of a command with other options."""
    parser.add_argument("--config", metavar="FILE", help="a YAML file of keys, such as RUN/config.yaml, below the overrides")
    parser.add_argument(
        "--config-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="a folder with your own experiment/, objective/, ... files",
    )
    parser.add_argument("overrides", nargs="*", metavar=metavar, help="of the training configuration (docs/configuration.md)")


def config_arguments(options: argparse.Namespace) -> list[str]:
    """The parsed options of `add_config_options` as arguments for `load_config`."""
    file = [] if options.config is None else ["--config", options.config]
    return [*file, *(word for folder in options.config_dir for word in ("--config-dir", folder)), *options.overrides]


def read_arguments(arguments: Sequence[str]) -> tuple[Sources, list[Override]]:
    """Separate the options from the overrides, and read both.

    Raises:
        ConfigError: an option lacks its value or names no folder of choices, or an override is not one.
    """
    sources, words = Sources(), list[str]()
    rest = iter(arguments)
    for word in rest:
        option, sign, value = word.partition("=")
        if option not in ("--config", "--config-dir"):
            words.append(word)
            continue
        value = value if sign else next(rest, "")
        if not value:
            raise ConfigError(f"{option} needs a {'file' if option == '--config' else 'folder'}: {option} PATH")
        if option == "--config-dir":
            _add_folder(sources, value, option)
        elif sources.file is not None:
            raise ConfigError(
                f"--config is given twice, {sources.file} and {value}: a run has one file; put the rest in overrides"
            )
        else:
            sources.file = Path(value).expanduser()
    for each in read_overrides([word for word in words if name_of(word) == "hydra.searchpath"], []):
        for folder in [each.value] if isinstance(each.value, str) else each.value or []:
            _add_folder(sources, str(folder), "hydra.searchpath")
    words = [word for word in words if name_of(word) != "hydra.searchpath"]
    return sources, read_overrides(words, sources.groups())


def _add_folder(sources: Sources, name: str, option: str) -> None:
    """Add a user's folder of choices.

    Raises:
        ConfigError: it does not exist, contains no choices, or contains a choice whose name is taken.
    """
    if name.startswith("pkg://"):
        raise ConfigError(f"{option}: {name} is not a folder: name one, such as {option}=['DIR']")
    folder = Path(name.removeprefix("file://")).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"{option}: {name} is not a folder: name one that holds experiment/NAME.yaml or other choices")
    files = sorted(folder.glob("*/*.yaml"))
    if not files:
        raise ConfigError(f"{option}: {name} holds no choices: they are files such as {name}/experiment/NAME.yaml")
    for file in files:
        taken = sources.choices(file.parent.name).get(file.stem)
        if taken is not None and not taken.samefile(file):
            raise ConfigError(f"{file}: {file.parent.name}={file.stem} already exists ({taken}): give the file another name")
    if folder not in sources.folders:
        sources.folders.append(folder)

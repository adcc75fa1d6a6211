"""Compose the configuration from YAML files in `conf/` and the user's folders (with Hydra), a file of keys, and overrides."""

from __future__ import annotations

import itertools
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kdrl_mcore.config.checks import check_config, check_ranges, flatten
from kdrl_mcore.config.keys import general_name, nearest
from kdrl_mcore.config.overrides import (
    KEY_TYPES,
    SECTIONS,
    Override,
    apply,
    check_key,
    override,
)
from kdrl_mcore.config.schema import BenchmarkConfig, Config, SourceConfig
from kdrl_mcore.config.sources import DEFAULT_GROUPS, MAY_BE_LEFT_OUT, Sources, conf_dir, read_arguments
from kdrl_mcore.errors import ConfigError

PATHS = (
    "run.dir",
    "student.path",
    "teacher.path",
    "rollout.path",
    "rollout.given.path",
    "reward.local.path",
    "data.train",
    "data.eval",
    "checkpoint.resume",
)
"""Keys whose value may begin with `~`, the user's home folder."""
TEMPLATES = ("plain_template", "message_template", "system_prompt")
"""Keys of `data` and `teacher.prompt` whose text may come from a file: `@FILE`."""


def load_config(arguments: Sequence[str]) -> Config:
    """Compose the configuration and check it.

    Later sources take precedence: the schema's defaults, `conf/` with the user's folders and the groups' choices, the file of
    `--config`, the overrides. A choice on the command line resets, over a file, all keys that any choice of its group sets (see
    `_choose_over`).

    Args:
        arguments: overrides (`key=value`, `group=choice`), `--config FILE` and `--config-dir DIR`.

    Raises:
        ConfigError: an unknown key (the message names the nearest one), an unknown group choice, a value of the wrong type or
            out of range, or settings that do not fit together.
    """
    sources, overrides = read_arguments(arguments)
    groups = sources.groups()
    chosen = {each.name: each for each in overrides if each.name in groups and not isinstance(each.value, dict)}
    settings = [each for each in overrides if each.name not in chosen]
    for choice in chosen.values():
        _check_choice(choice, sources)
    try:
        if sources.file is None:
            composed = _compose(sources, {name: choice.value for name, choice in chosen.items()})
        else:
            composed = _compose_file(sources, chosen)
        for setting in settings:
            apply(composed, setting.name, setting.value, setting.word)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise _explain(error) from error
    assert isinstance(config, Config)
    _read_templates(config)
    _expand_homes(config)
    config.data.sources = [_with_dataset(source) for source in config.data.sources]
    check_config(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML; `--config` reads it back as the same configuration."""
    tree: Any = asdict(config)
    prompts = [tree["teacher"]["prompt"], *(teacher["prompt"] for teacher in tree["teachers"].values())]
    for section, name in itertools.product((tree["data"], *prompts), TEMPLATES):
        if (section[name] or "").startswith("@"):
            section[name] = f"@{section[name]}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a report may be reading the file of a run that resumes
    temporary.write_text(OmegaConf.to_yaml(_without_interpolations(tree)))
    temporary.replace(path)


def load_saved(flat: Mapping[str, Any]) -> Config:
    """The configuration of a run directory, perhaps of another version, from its flat keys. Keys that this version does not
    have are left out, values that it does not take are replaced by the defaults, and nothing is checked."""
    defaults = flatten(asdict(Config()))
    config = OmegaConf.structured(Config)
    for name in defaults.keys() & flat.keys():
        if flat[name] != defaults[name] and "${" not in str(flat[name]):
            with suppress(OmegaConfBaseException):
                OmegaConf.update(config, name, flat[name])
    for name in sorted(flat.keys() - defaults.keys()):
        if general_name(name) != name and "${" not in str(flat[name]):
            with suppress(ConfigError):
                apply(config, name, flat[name], name)
    loaded = OmegaConf.to_object(config)
    assert isinstance(loaded, Config)
    return loaded


def load_benchmark(name: str) -> BenchmarkConfig:
    """The benchmark defined by `conf/benchmark/NAME.yaml`.

    Raises:
        ConfigError: there is no such benchmark (the message names the nearest), or its file is invalid.
    """
    folder = conf_dir() / "benchmark"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"eval.benchmarks: no such benchmark '{name}'; there are: {', '.join(known)}{nearest(name, known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(BenchmarkConfig), OmegaConf.load(folder / f"{name}.yaml"))
        benchmark = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{folder / name}.yaml: {' '.join(str(error).split())}") from error
    assert isinstance(benchmark, BenchmarkConfig)
    check_ranges(asdict(benchmark))
    return benchmark


def _with_dataset(source: SourceConfig) -> SourceConfig:
    """The source, with its null values taken from the `conf/dataset/NAME.yaml` that it names."""
    if source.dataset is None:
        return source
    folder = conf_dir() / "dataset"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if source.dataset not in known:
        there = f"there are: {', '.join(known)}{nearest(source.dataset, known)}"
        raise ConfigError(f"data.sources: no such dataset '{source.dataset}'; {there}")
    tree = OmegaConf.to_container(OmegaConf.load(folder / f"{source.dataset}.yaml"))
    assert isinstance(tree, dict)
    columns = dict(tree["data"])
    given = {"path": columns.pop("train"), "reward": tree.get("reward", {}).get("kind"), **columns}
    return replace(source, **{key: value for key, value in given.items() if getattr(source, key) is None})


def _check_choice(choice: Override, sources: Sources) -> None:
    known = list(sources.choices(choice.name))
    if choice.value is None and choice.name in MAY_BE_LEFT_OUT:
        return
    there = f"there are: {', '.join(known) or 'none'}"
    if choice.value is None or choice.value == "":
        raise ConfigError(f"{choice.word}: {choice.name} needs a choice; {there}")
    if choice.value not in known:
        raise ConfigError(f"{choice.word}: no such {choice.name}; {there}{nearest(str(choice.value), known)}")


def _compose(sources: Sources, chosen: Mapping[str, Any]) -> DictConfig:
    """The schema with the default choices, replaced by `chosen`, and then the chosen ones of the user's own groups."""
    words = [
        f"{'' if name in DEFAULT_GROUPS else '+'}{override(name, str(value))}"
        for name, value in chosen.items()
        if value is not None
    ]
    if sources.folders != [conf_dir()]:
        return _with_hydra("config", [sources.search_path(), *words])
    composed: DictConfig = pickle.loads(_of_the_package(tuple(words)))
    return composed


@cache
def _of_the_package(words: tuple[str, ...]) -> bytes:
    """Choices from the package's own files, composed and pickled. A study or a test reads the same ones hundreds of times, and
    Hydra takes 0.1 s each time. The files are taken not to change while a process runs."""
    return pickle.dumps(_with_hydra("config", words))


def _with_hydra(config: str | None, words: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return compose(config, overrides=list(words))


def _compose_file(sources: Sources, chosen: Mapping[str, Override]) -> DictConfig:
    """The choices that the file names, overridden by its keys, then by the command line's choices."""
    assert sources.file is not None
    if "experiment" in chosen and chosen["experiment"].value is not None:
        raise ConfigError(
            f"{chosen['experiment'].word}: --config {sources.file} stands for an experiment: leave one out, or name the "
            "experiment in the file (experiment: NAME)"
        )
    tree = _read_file(sources.file)
    groups = sources.groups()
    choices = {name: value for name, value in tree.items() if name in groups and isinstance(value, str)}
    named = {}
    for name, value in (*_defaults_of(tree.pop("defaults", None), groups, sources.file), *choices.items()):
        _check_choice(Override(f"{sources.file}: {name}={value}", name, value), sources)
        named[name] = value
    composed = _compose(sources, named)
    for name, value in _leaves({name: value for name, value in tree.items() if name not in choices}, sources.file):
        apply(composed, name, value, f"{sources.file}: {name}={value}")
    for choice in chosen.values():
        if choice.value is not None:
            _choose_over(composed, choice, sources)
    return composed


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config: {path} is not a file: name a YAML file of keys, such as RUN/config.yaml")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"--config: {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds no keys: write them as in RUN/config.yaml")
    return tree


def _defaults_of(entries: Any, groups: Sequence[str], file: Path) -> Iterator[tuple[str, Any]]:
    """The choices in a file's `defaults` list, in Hydra's syntax."""
    for entry in entries or []:
        if entry in ("_self_", "schema"):
            continue
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ConfigError(f"{file}: defaults: '{entry}' is not a group and its choice, such as experiment: tiny_cpu")
        ((name, value),) = entry.items()
        name = str(name).removeprefix("override ").removeprefix("optional ").strip().removeprefix("/")
        if name not in groups:
            raise ConfigError(f"{file}: defaults: there is no group '{name}'{nearest(name, groups)}")
        yield name, value


def _leaves(tree: Mapping[str, Any], path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        check_key(name, where=f"{path}: ")
        if general_name(name) not in SECTIONS:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _leaves(value, path, f"{name}.")
        else:
            raise ConfigError(f"{path}: '{name}' is a section: write its keys below it, or leave it out")


def _choose_over(composed: DictConfig, choice: Override, sources: Sources) -> None:
    """Apply a choice to a composed configuration: every key that any choice of the group sets is reset to its default, then
    this choice's keys are set. So nothing of an objective remains when another one is chosen."""
    defaults = flatten(asdict(Config()))
    about = {name for file in sources.choices(choice.name).values() for name in _keys_of(file, choice.name)}
    for name in sorted(about & defaults.keys()):
        apply(composed, name, defaults[name], choice.word)
    # Not as the primary config: Hydra does not look for that in the user's folders.
    preset: Any = OmegaConf.to_container(
        _with_hydra(None, [sources.search_path(), f"+{override(choice.name, str(choice.value))}"])
    )
    for name, value in flatten(preset).items():
        check_key(name, where=f"{choice.word}: ")
        apply(composed, name, value, choice.word)


def _keys_of(file: Path, group: str) -> set[str]:
    """The keys that the file of a choice sets."""
    package = re.search(r"^#\s*@package\s+(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    prefix = group if package is None else package[1].removeprefix("_global_")
    tree: Any = OmegaConf.to_container(OmegaConf.load(file)) or {}
    return {f"{prefix}.{name}".removeprefix(".") for name in flatten(tree)}


def _read_templates(config: Config) -> None:
    """Replace `@FILE` by the file's text, without a byte order mark; `@@` stands for a text that begins with `@`."""
    prompts = [("teacher.prompt", config.teacher.prompt)]
    prompts += [(f"teachers.{name}.prompt", teacher.prompt) for name, teacher in config.teachers.items()]
    for (key, section), name in itertools.product((("data", config.data), *prompts), TEMPLATES):
        text = getattr(section, name)
        if text is None or not text.startswith("@"):
            continue
        path = Path(text[1:]).expanduser()
        try:
            content = text[1:] if text.startswith("@@") else path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"{key}.{name}={text}: {path} cannot be read ({cause}); write @@ for a text that begins with @"
            ) from error
        setattr(section, name, content)


def _expand_homes(config: Config) -> None:
    for key in PATHS:
        *parents, name = key.split(".")
        section: Any = config
        for parent in parents:
            section = getattr(section, parent)
        value = getattr(section, name)
        if value and value.startswith("~"):
            setattr(section, name, os.path.expanduser(value))
    for teacher in config.teachers.values():
        teacher.path = os.path.expanduser(teacher.path) if teacher.path else None
    for source in config.data.sources:
        source.path = os.path.expanduser(source.path) if source.path else None
        source.eval = os.path.expanduser(source.eval) if source.eval else None


def _without_interpolations(node: Any) -> Any:
    """The tree with `${` escaped in texts, where it would otherwise be read as a reference to another key."""
    if isinstance(node, dict):
        return {key: _without_interpolations(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_interpolations(value) for value in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _explain(error: Exception) -> ConfigError:
    """A one-line ConfigError for an error in a YAML file, or in a reference to another key."""
    text = str(error)
    found = re.search(r"full_key: (\S+)", text)
    where = found[1] if found else getattr(error, "full_key", None) or ""
    lines = [line.strip() for line in re.split(r"\n\s*(?:full_key|Config search path):", text)[0].splitlines() if line.strip()]
    text = " ".join(lines).replace(" raised while composing config", "")
    if re.search(r"Key '[^']*' not in", text):
        own = "" if "." in where else "; a choice of a group of your own begins with the line '# @package _global_'"
        known = [key for key in KEY_TYPES if "[]" not in key]
        return ConfigError(f"{text.split(':')[0]}: unknown configuration key '{where}'{nearest(where, known)}{own}")
    return ConfigError(f"{where}: {text}" if where and where not in text else text)

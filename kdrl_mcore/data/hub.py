"""Models and data sets from the Hugging Face hub: models are downloaded once per machine, and commits are resolved."""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import section_of, served_teachers, teacher_heads, uses_teacher
from kdrl_mcore.convert.hub import HubId, download, find_commit, hub_id
from kdrl_mcore.data.arrow_rows import COMMIT
from kdrl_mcore.data.files import is_file
from kdrl_mcore.errors import KdrlError, ModelError
from kdrl_mcore.parallel.collect import gather_objects, on_first_rank
from kdrl_mcore.resilience.store import own_store

POLL_SECONDS = 0.2
"""Interval between checks whether other ranks have finished downloading."""
COMMIT_SECONDS = 10.0
"""Time-out for asking the hub for a data set's commit."""

logger = logging.getLogger(__name__)
_calls = itertools.count()  # the same number on every rank


def resolve_hub(config: Config) -> tuple[Config, dict[str, str]]:
    """Call `resolve_models` and resolve the commits of the data sets. Collective over the world.

    Returns:
        The configuration with the models' folders, and `org/name@commit` for each key whose model or data set comes from the
        hub.

    Raises:
        ModelError: on every rank: a model cannot be obtained.
    """
    resolved, commits = resolve_models(config)
    return resolved, commits | on_first_rank(partial(_data_commits, config))


def resolve_models(config: Config) -> tuple[Config, dict[str, str]]:
    """Download the models that the configuration names by hub id. Collective over the world.

    Returns:
        The configuration with folders of the hub's cache in place of hub ids, and `org/name@commit` for each key whose model
        comes from the hub.

    Raises:
        ModelError: on every rank: a model cannot be obtained.
    """
    used = {"student.path": config.student.path}
    if uses_teacher(config.objective):
        used["teacher.path"] = config.teacher.path
        used |= {f"teachers.{name}.path": teacher.path for name, teacher in config.teachers.items()}
    bare = {
        f"{section_of(config, name)}.path"
        for name, each in served_teachers(config).items()
        if name not in teacher_heads(config)
    }
    folders, commits = resolve({key: path for key, path in used.items() if path}, bare)
    student = replace(config.student, path=folders.get("student.path", config.student.path))
    teacher = replace(config.teacher, path=folders.get("teacher.path", config.teacher.path))
    teachers = {
        name: replace(each, path=folders.get(f"teachers.{name}.path", each.path)) for name, each in config.teachers.items()
    }
    return replace(config, student=student, teacher=teacher, teachers=teachers), commits


def resolve(paths: Mapping[str, str], without_weights: Collection[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """Download the models that are named by a hub id. Rank 0 resolves the commits and the first rank of each machine downloads;
    the others wait outside of collectives, which could time out. Collective over the world.

    Args:
        paths: paths or hub ids, by the name of the key or option.
        without_weights: the names of those of which only config and tokenizer are read.

    Returns:
        The folders and the `org/name@commit`, both by name. Names whose value is a path are left out.

    Raises:
        ModelError: on every rank: a model cannot be obtained.
    """
    found = on_first_rank(partial(_find, paths))
    if not found:
        return {}, {}
    hosts = gather_objects(socket.gethostname())
    leaders = sorted({hosts.index(host) for host in hosts})
    leader = hosts.index(hosts[dist.get_rank()])
    folders, failure = dict[str, str](), None
    store, prefix = own_store(), f"kdrl_mcore/hub/{next(_calls)}"
    assert store is not None
    if leader == dist.get_rank():
        try:
            folders = {name: str(download(model, weights=name not in without_weights)) for name, model in found.items()}
        except KdrlError as error:
            failure = str(error)
        finally:
            store.set(f"{prefix}/{leader}", "1")
    while not store.check([f"{prefix}/{each}" for each in leaders]):
        time.sleep(POLL_SECONDS)
    everywhere = gather_objects((failure, folders))
    failures = [f"{text} ({host})" for (text, _), host in zip(everywhere, hosts, strict=True) if text is not None]
    if failures:
        raise ModelError(failures[0])
    folders = everywhere[leader][1]
    if not all(Path(folder).is_dir() for folder in folders.values()):  # two machines have the same name
        folders = {name: str(download(model, weights=name not in without_weights)) for name, model in found.items()}
    return folders, {name: str(model) for name, model in found.items()}


def _find(paths: Mapping[str, str]) -> dict[str, HubId]:
    """The models that come from the hub, each with its commit. Called on rank 0, which decides for all ranks what is a path."""
    found = {}
    for name, path in paths.items():
        model = hub_id(path)
        if model is None:
            continue
        try:
            found[name] = HubId(model.repo, find_commit(model))
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        logger.info("%s: %s on the hub is commit %s", name, model, found[name].revision)
    return found


def _data_commits(config: Config) -> dict[str, str]:
    """The current commits of the data sets that are hub ids, as far as the hub reports them."""
    data = config.data
    named = {"data.train": data.train, "data.eval": data.eval if config.eval.every >= 0 else None}
    named |= {f"data.sources[{index}].path": source.path for index, source in enumerate(data.sources)}
    named |= {f"data.sources[{index}].eval": source.eval for index, source in enumerate(data.sources) if config.eval.every >= 0}
    commits = {}
    for key, source in named.items():
        if source is None or is_file(source):
            continue
        repo, _, revision = source.partition("@")
        if (commit := _data_commit(repo, revision or None)) is not None:
            commits[key] = f"{repo}@{commit}"
    return commits


def _data_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a data set, or None if the hub does not report it: only reading the data set has to work."""
    from huggingface_hub import HfApi

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(repo, revision=revision, timeout=COMMIT_SECONDS).sha
    except Exception as error:  # the network library's errors too
        logger.info("the commit of %s is not known (%s)", repo, type(error).__name__)
        return None

"""Checks of teachers on servers (`teacher.server`, `teachers.NAME.server`): what they score, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from urllib.parse import urlsplit

from kdrl_mcore.config.derived import (
    DISTRIBUTION,
    ENTROPIES,
    compares_over_vocabulary,
    is_served,
    knows_top_k,
    may_teach_together,
    section_of,
    separate_teachers,
    served_teachers,
    wanted_scores,
)
from kdrl_mcore.config.schema import (
    Config,
    NamedTeacherConfig,
    ObjectiveConfig,
    TeacherConfig,
    TeacherParallelConfig,
    TeacherServerConfig,
)
from kdrl_mcore.errors import ConfigError


def check_teacher_servers(config: Config) -> None:
    """Refuse settings of teachers on servers that contradict each other or have no effect, and objectives for which the servers
    have no scores.

    Raises:
        ConfigError: the message names the key and what to set instead.
    """
    every = {"teacher": config.teacher} | {f"teachers.{name}": each for name, each in config.teachers.items()}
    for section, teacher in every.items():
        _check_settings(f"{section}.server", teacher.server)
    if is_served(config.teacher) and config.teacher.weights != "path":
        raise ConfigError(
            f"teacher.server.kind={config.teacher.server.kind} is for another model than the student, not for "
            f"teacher.weights={config.teacher.weights}: leave one out"
        )
    for name, served in served_teachers(config).items():
        _check_served(config, section_of(config, name), served)
    _check_together(config)
    waits = [name for name, each in served_teachers(config).items() if not each.server.urls]
    if config.cluster.teacher_nodes and (not waits or config.cluster.teacher_nodes % len(waits)):
        raise ConfigError(
            f"cluster.teacher_nodes={config.cluster.teacher_nodes} are divided among the teachers with server.kind and without "
            f"server.urls, which are {len(waits)}: change one of them"
        )


def _check_settings(section: str, server: TeacherServerConfig) -> None:
    """Check settings that one another make useless, and addresses."""
    for key, default in asdict(TeacherServerConfig()).items():
        value = getattr(server, key)
        if key != "kind" and value != default and server.kind == "none":
            raise ConfigError(
                f"{section}.{key}={value} is for a teacher on servers: set {section}.kind to completions or hidden_states, or "
                "leave it out"
            )
    if server.kind == "hidden_states" and server.model is not None:
        raise ConfigError(f"{section}.model={server.model} is for {section}.kind=completions: leave it out")
    if server.urls and server.replicas != TeacherServerConfig.replicas:
        raise ConfigError(f"{section}.replicas={server.replicas} is for servers without {section}.urls: leave one out")
    if server.token_file is not None and not server.urls:
        raise ConfigError(f"{section}.token_file is for {section}.urls: servers in RUN/teachers write their tokens there")
    for url in server.urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{section}.urls: '{url}' is not an address such as http://node7:8000")
        if server.urls.count(url) > 1:
            raise ConfigError(f"{section}.urls names {url} twice: leave one out")


def _check_served(config: Config, section: str, teacher: TeacherConfig | NamedTeacherConfig) -> None:
    kind, layout = f"{section}.server.kind={teacher.server.kind}", teacher.parallel
    ours = TeacherParallelConfig(tensor=layout.tensor if config.cluster.teacher_nodes and not teacher.server.urls else 1)
    if layout != ours:
        raise ConfigError(
            f"{kind}: the servers have their own layout, so leave {section}.parallel alone (its `tensor` is the number of GPUs "
            "of a server on the nodes of cluster.teacher_nodes)"
        )
    if not teacher.offload:
        raise ConfigError(f"{kind} has no weights in this job: leave {section}.offload out")
    if teacher.server.kind == "hidden_states":
        if not teacher.path and compares_over_vocabulary(config.objective):
            raise ConfigError(f"{kind} needs the teacher's output head: name its folder with {section}.path")
        return
    if not teacher.path and teacher.prompt.template == "chat":
        raise ConfigError(
            f"{section}.prompt.template=chat is the template of the teacher's own tokenizer: name its folder with "
            f"{section}.path (no weights of it are read)"
        )
    if config.rollout.temperature != 1:
        raise ConfigError(
            f"{kind} gives log-probs at temperature 1 only, and rollout.temperature={config.rollout.temperature:g}: set it to "
            f"1, or serve the teacher with {section}.server.kind=hidden_states"
        )
    for key, lacks in _lacking(config.objective):
        raise ConfigError(
            f"{kind} gives log-probs of the sampled token and of the teacher's own top k, but objective.{key} needs {lacks}: "
            f"set objective.kd.estimator to k1, k2, k3 or top_k, or serve the teacher with {section}.server.kind=hidden_states"
        )


def _lacking(objective: ObjectiveConfig) -> Iterator[tuple[str, str]]:
    """The settings for which a completions server has no scores, and what these would be."""
    kd = objective.kd
    if DISTRIBUTION in wanted_scores(objective):
        if kd.control_variate:
            yield "kd.control_variate=true", "its whole distribution"
        elif kd.estimator != "top_k":
            yield f"kd.estimator={kd.estimator}", "its whole distribution"
        elif kd.top_k_support != "teacher":
            yield f"kd.top_k_support={kd.top_k_support}", "its log-probs of the student's top k (set top_k_support=teacher)"
    if ENTROPIES in wanted_scores(objective):
        yield f"kd.token_weight.kind={kd.token_weight.kind}", "the entropy of its whole distribution"
    if kd.mix == "entropy" or ":" in kd.mix:
        yield f"kd.mix={kd.mix}", "the entropy of its whole distribution"


def _check_together(config: Config) -> None:
    """Check the divergences over the vocabulary from several teachers of different kinds."""
    if not knows_top_k(config) or not config.teachers:
        return
    estimator = f"objective.kd.estimator={config.objective.kd.estimator}"
    others = [name for name, each in separate_teachers(config).items() if each.server.kind != "completions"]
    if others:
        raise ConfigError(
            f"{estimator} cannot have some teachers on completions servers and others (teachers.{others[0]}) with their whole "
            "distribution: set objective.kd.estimator to k1, k2 or k3, or server.kind=hidden_states"
        )
    if may_teach_together(config):
        raise ConfigError(
            f"several teachers may teach one prompt, and the top k of completions servers do not give the mixture that "
            f"{estimator} needs: set objective.kd.estimator to k1, k2 or k3, or give each prompt one teacher"
        )

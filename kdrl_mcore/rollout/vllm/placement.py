"""Where the engine servers run, which rank starts them, and the operations that all ranks perform on them together.

`colocated`: on the GPUs of the training ranks; rank e * E starts server e, which uses the GPUs of ranks e * E to e * E + E - 1
(E is `rollout.vllm.tensor`). `server`: elsewhere; they are found in RUN/servers or listed in `rollout.vllm.servers`. A job on a
single node without `cluster.server_nodes` starts missing ones itself, on GPUs that no rank uses.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdrl_mcore.config import Config
from kdrl_mcore.config.derived import server_arguments
from kdrl_mcore.errors import ConfigError, EngineError
from kdrl_mcore.model.families import config_folder
from kdrl_mcore.parallel.collect import gather_objects
from kdrl_mcore.parallel.interfaces import own_address
from kdrl_mcore.parallel.mcore import drop_gathering_buffer
from kdrl_mcore.rollout.vllm.client import TOKEN_VARIABLE, EngineServer, Launch, ServerFailed, address_path
from kdrl_mcore.rollout.vllm.gpu_memory import ENGINE_SHARE, free_share, give_back
from kdrl_mcore.rollout.vllm.host_memory import engine_gib, tight_memory

logger = logging.getLogger(__name__)


@dataclass
class Replicas:
    """All servers, as one rank sees them.

    Attributes:
        servers: handles by index. Only a server's owner starts and refits it; rank 0 generates with all.
        owners: the owner rank of each server.
        colocated: whether they share the ranks' GPUs.
    """

    servers: list[EngineServer]
    owners: list[int]
    colocated: bool

    def __len__(self) -> int:
        return len(self.servers)

    def own(self, indices: Sequence[int]) -> list[EngineServer]:
        """The servers among these that this rank owns."""
        return [self.servers[index] for index in indices if self.owners[index] == dist.get_rank()]

    def failures(self, action: Callable[[EngineServer], Any], indices: Sequence[int]) -> dict[int, str]:
        """Have each owner perform an action on its servers, all at once. Returns which failed and why, on every rank.
        Collective over the world.

        Raises:
            EngineError: on all ranks, if a server refuses a request.
        """
        return self._run(action, indices)[0]

    def each(self, action: Callable[[EngineServer], Any]) -> bool:
        """Have each owner perform an action on its servers. Returns whether any action returned true; a failure shows when the
        server is next used. Collective over the world."""
        return self._run(action, range(len(self)))[1]

    def restart(self, indices: Sequence[int]) -> dict[int, str]:
        """Start servers again and wait until they are ready. Returns those that failed, with the reason. Collective over the
        world."""
        if indices:
            self.make_room()
        failed = self.failures(lambda server: server.restart(), indices) if indices else {}
        if indices:
            self.share_addresses()
        return failed

    def make_room(self) -> None:
        """Free all memory that training does not use, before colocated engines allocate. Collective over the world: when it
        returns, every rank has."""
        if self.colocated:
            drop_gathering_buffer()
            give_back()
            gather_objects(None)

    def share_addresses(self) -> None:
        """Share every server's address with every rank. Collective over the world."""
        mine = {server.index: (server.address, server.token) for server in self.own(range(len(self)))}
        for addresses in gather_objects(mine):
            for index, (address, token) in addresses.items():
                self.servers[index].set_address(address, token)

    def stop(self) -> None:
        """End the servers that this rank started."""
        _at_once(lambda server: server.stop(), self.servers)

    def _run(self, action: Callable[[EngineServer], Any], indices: Sequence[int]) -> tuple[dict[int, str], bool]:
        def attempt(server: EngineServer) -> tuple[int, Any]:
            try:
                return server.index, bool(action(server))
            except (ServerFailed, EngineError) as error:
                return server.index, error

        outcomes = dict(item for part in gather_objects(_at_once(attempt, self.own(indices))) for item in part)
        refused = [outcome for outcome in outcomes.values() if isinstance(outcome, EngineError)]
        if refused:
            raise refused[0]
        failed = {index: str(outcome) for index, outcome in sorted(outcomes.items()) if isinstance(outcome, ServerFailed)}
        return failed, any(outcome is True for outcome in outcomes.values())


def start_replicas(
    config: Config, vocab_size: int, share: float | None = None, on_wait: Callable[[], None] = lambda: None
) -> Replicas:
    """Start or find every server, and wait until all are ready. Collective over the world.

    Args:
        share: the share of a GPU for a colocated engine. By default the configured one, or else what is free now, which is
            right only if nothing more will be allocated.
        on_wait: called repeatedly while waiting, by a thread for each server.

    Raises:
        ConfigError: vLLM is not installed, or the layout does not fit.
        EngineError: a server did not start, or was not found within the start-up time-out.
    """
    settings, run_dir = config.rollout.vllm, Path(config.run.dir)
    make = partial(
        EngineServer,
        startup_timeout=settings.startup_timeout,
        generation_timeout=settings.generation_timeout,
        refit_timeout=settings.refit_timeout,
        unfinished=config.rollout.unfinished,
    )
    if settings.servers:
        token = os.environ.get(TOKEN_VARIABLE)
        if token is None:
            raise ConfigError(f"rollout.vllm.servers is set, but {TOKEN_VARIABLE} is not: export the servers' token")
        servers = [make(index, run_dir, address=address, token=token) for index, address in enumerate(settings.servers)]
        replicas = Replicas(servers, [0] * len(servers), colocated=False)
    else:
        owners = find_owners(config)
        single_node = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
        starts_missing = single_node and not config.cluster.server_nodes
        (token,) = gather_objects(secrets.token_urlsafe(32))[:1]
        replicas = Replicas([], owners, settings.placement == "colocated")
        replicas.make_room()
        if dist.get_rank() == 0:
            _announce(config, owners)
        if share is None:
            share = settings.gpu_memory_utilization or _free_share(replicas.colocated)
        for index, owner in enumerate(owners):
            server = make(index, run_dir)
            if owner == dist.get_rank() and (replicas.colocated or (starts_missing and not _is_there(server))):
                launch = Launch(_arguments(config, vocab_size, single_node, share), _environment(config, index))
                server = make(index, run_dir, token=token, launch=launch)
                server.start()
            replicas.servers.append(server)
    try:
        failures = replicas.failures(lambda server: server.wait_until_ready(on_wait), range(len(replicas)))
        if failures:
            raise EngineError("; ".join(failures.values()))
    except BaseException:
        replicas.stop()
        raise
    replicas.share_addresses()
    return replicas


def _announce(config: Config, owners: Sequence[int]) -> None:
    """Log what a user should know before the engines start: that it takes minutes, or that they may not fit."""
    if torch.cuda.is_available():
        logger.info("starting vLLM engines: the first start of a model on a machine takes minutes of compilation")
        return
    here = sum(owner < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) for owner in owners)
    settings = config.rollout.vllm
    each = engine_gib(str(config.student.path), config.model.dtype, settings.tensor, settings.kv_cache_gib)
    tight = tight_memory(each, here)
    if tight is not None:
        logger.warning(tight)


def check_installed() -> None:
    """Raise ConfigError if vLLM is not installed where a rank has to start it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout=vllm needs vLLM, which is not installed: pip install 'kdrl-mcore[vllm]' (CUDA) or run make setup (CPU)"
        )


def find_owners(config: Config) -> list[int]:
    """For each engine, the rank that starts and refits it.

    Raises:
        ConfigError: colocated engines do not fit the ranks.
    """
    settings, world_size = config.rollout.vllm, dist.get_world_size()
    if settings.placement == "server":
        return [0] * max(1, settings.replicas)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local % settings.tensor:
        raise ConfigError(
            f"rollout.vllm.tensor={settings.tensor} does not divide the {local} ranks of a node, whose GPUs colocated engines "
            "use: change it, or set rollout.vllm.placement=server"
        )
    count = world_size // settings.tensor
    if settings.replicas > count:
        raise ConfigError(
            f"rollout.vllm.replicas={settings.replicas} colocated engines of rollout.vllm.tensor={settings.tensor} do not fit "
            f"{world_size} ranks: at most {count}"
        )
    return [engine * settings.tensor for engine in range(settings.replicas or count)]


def _is_there(server: EngineServer) -> bool:
    """Whether this server has been started already."""
    if not address_path(server.run_dir, server.index).is_file():
        return False
    server.read_address()
    try:
        server.health()
    except (ServerFailed, EngineError):  # the address belongs to an earlier run
        return False
    return True


def _free_share(colocated: bool) -> float:
    """The share of every GPU for an engine. Collective over the world."""
    return min(gather_objects(free_share() if colocated and torch.cuda.is_available() else ENGINE_SHARE))


def _arguments(config: Config, vocab_size: int, single_node: bool, share: float) -> tuple[str, ...]:
    check_installed()
    if config.rollout.replay_experts and not torch.cuda.is_available():
        raise ConfigError(
            "rollout.replay_experts=true: vLLM returns the experts only on CUDA: set rollout=megatron, or the key to false"
        )
    host = "127.0.0.1" if single_node else own_address(os.environ["MASTER_ADDR"])
    arguments = server_arguments(config, config_folder(str(config.student.path)), share)
    return (*arguments, "--vocabulary", str(vocab_size), "--host", host)


def _environment(config: Config, index: int) -> dict[str, str]:
    """The environment variables that select the server's GPUs, or without a GPU the number of its threads: this rank's, which
    otherwise each of the machine's engines would have for every core."""
    if not torch.cuda.is_available():
        return {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    settings = config.rollout.vllm
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices, local = visible.split(","), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = int(os.environ.get("LOCAL_RANK", "0")) if settings.placement == "colocated" else local + index * settings.tensor
    mine = devices[first : first + settings.tensor]
    if len(mine) < settings.tensor:
        raise ConfigError(
            f"engine {index} needs {settings.tensor} GPUs in addition to those of {local} ranks, but the node has "
            f"{len(devices)}: use fewer ranks, rollout.vllm.placement=colocated, or servers on other nodes (docs/rollout.md)"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _at_once(action: Callable[[EngineServer], Any], servers: Sequence[EngineServer]) -> list[Any]:
    if not servers:
        return []
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(action, servers))

"""The trainer's side of an engine server: its HTTP interface and, if started here, its process. It does not import vLLM."""

from __future__ import annotations

import json
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from kdrl_mcore.errors import EngineError, KdrlError
from kdrl_mcore.resilience.interrupt import children_ignore_stop_signals
from kdrl_mcore.rollout.vllm.gpu_memory import ALLOCATOR_VARIABLES, without_expandable_segments

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "KDRL_ENGINE_TOKEN"
"""The environment variable with the token that a server requires."""
_POLL_SECONDS = 0.2
_KILL_SECONDS = 0.05
_STOP_SECONDS = 15.0
_SHORT_SECONDS = 10.0  # for a response that needs no work
_RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "CUDA_DEVICE_MAX_CONNECTIONS",  # 1 in a rank, for Megatron-Core (kdrl_mcore/parallel/platform.py)
)
_RANK_PREFIXES = ("TORCHELASTIC_", "TORCH_NCCL_", "TORCH_FR_")  # NCCL's flight recorder names its files by rank


class ServerFailed(KdrlError):
    """The server is gone, hangs or reports an internal failure: start it again."""


@dataclass(frozen=True)
class Launch:
    """How to start a server.

    Attributes:
        arguments: arguments of `kdrl_mcore.rollout.vllm.server`, without --run-dir, --index and --parent.
        environment: variables added to this process's.
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class EngineServer:
    """One engine server, started here (`launch`) or elsewhere.

    Methods block and raise ServerFailed unless documented otherwise; `generate` is asynchronous.
    """

    def __init__(
        self,
        index: int,
        run_dir: Path,
        *,
        address: str | None = None,
        token: str | None = None,
        launch: Launch | None = None,
        startup_timeout: float = 600.0,
        generation_timeout: float = 300.0,
        refit_timeout: float = 300.0,
        unfinished: str = "wait",
    ) -> None:
        """Args:
        address, token: if None, they are read from `RUN/servers/INDEX.json` once the server is ready.
        generation_timeout: seconds without progress after which a server counts as hanging.
        refit_timeout: seconds for all weights.
        unfinished: how unfinished responses continue with new weights (`rollout.unfinished`).
        """
        self.index = index
        self.address = address
        self.token = token
        self._fixed = address is not None
        self.run_dir = run_dir
        self._launch = launch
        self._startup_timeout, self._generation_timeout = startup_timeout, generation_timeout
        self._refit_timeout, self._unfinished = refit_timeout, unfinished
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """The output of a server that was started here."""
        return self.run_dir / "servers" / f"{self.index}.log"

    @property
    def pid(self) -> int | None:
        """The process and process group of a server that was started here."""
        return None if self._process is None else self._process.pid

    def set_address(self, address: str | None, token: str | None) -> None:
        """Set the address and token that the server's owner has found."""
        self.address, self.token = address, token

    def start(self) -> None:
        """Start the process without waiting until it is ready."""
        assert self._launch is not None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        address_path(self.run_dir, self.index).unlink(missing_ok=True)
        environment = engine_environment(os.environ)
        environment |= {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), **self._launch.environment}
        if self.token is not None:
            environment[TOKEN_VARIABLE] = self.token
        identity = ["--run-dir", str(self.run_dir), "--index", str(self.index), "--parent", str(os.getpid())]
        command = [sys.executable, "-m", "kdrl_mcore.rollout.vllm.server", *identity, *self._launch.arguments]
        with self.log.open("ab") as log, children_ignore_stop_signals():
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_until_ready(self, on_wait: Callable[[], None] = lambda: None) -> None:
        """Wait until the server answers and its address is known, calling `on_wait` meanwhile.

        Raises:
            ServerFailed: the server ended, or did not answer within the start-up time-out.
        """
        deadline = time.monotonic() + self._startup_timeout
        reason = "it wrote no address"
        while time.monotonic() < deadline:
            on_wait()
            if self._process is not None and self._process.poll() is not None:
                raise ServerFailed(f"engine {self.index} ended while it started ({last_line(self.log)}); see {self.log}")
            if self.read_address():
                try:
                    self.health()
                    return
                except ServerFailed as error:
                    reason = str(error)
            time.sleep(_POLL_SECONDS)
        raise ServerFailed(f"engine {self.index} did not start within {self._startup_timeout:g} s ({reason}); see {self.log}")

    def restart(self) -> None:
        """End the server, start it again and wait until it is ready. A server that was started elsewhere is only asked to end,
        and must be started again there."""
        if self._launch is None:
            with suppress(ServerFailed):
                self._post("stop", timeout=_SHORT_SECONDS)
                give_up = time.monotonic() + _STOP_SECONDS
                while time.monotonic() < give_up:  # the old one may still answer and must not be mistaken for the new one
                    self.health()
                    time.sleep(_POLL_SECONDS)
        else:
            if self._process is not None and (code := self._process.poll()) is not None:
                logger.warning(
                    "engine %d had ended with %s", self.index, f"signal {-code}" if code < 0 else f"exit code {code}"
                )
            self.kill()
            self.start()
        self.wait_until_ready()

    def stop(self) -> None:
        """End a server that was started here, and all its processes: ask first, then kill. Raises nothing."""
        if self._process is None:
            return
        if self._process.poll() is None and self.address is not None:
            with suppress(ServerFailed):
                self._post("stop", timeout=_SHORT_SECONDS)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Kill a server that was started here, and all its processes. Raises nothing."""
        if self._process is not None:
            kill_group(self._process.pid)
            self._process.wait()
            self._process = None
            address_path(self.run_dir, self.index).unlink(missing_ok=True)

    def health(self) -> dict[str, Any]:
        """The `version` of the weights, and whether they are `usable`."""
        return self._call("GET", "health", timeout=_SHORT_SECONDS)

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Have the workers receive weights as described by `spec`, then set their version. Returns each worker's report."""
        body = {"version": version, "spec": spec, "unfinished": self._unfinished}
        return self._post("weights", body, timeout=self._refit_timeout)["workers"]

    def sleep(self) -> bool:
        """Free GPU memory. Returns whether the weights are gone."""
        return self._post("sleep", timeout=self._refit_timeout)["gone"]

    def wake(self, tags: Sequence[str]) -> None:
        """Allocate GPU memory for `weights`, `kv_cache` or both."""
        self._post("wake", {"tags": list(tags)}, timeout=self._refit_timeout)

    async def generate(
        self,
        http: httpx.AsyncClient,
        version: int | None,
        requests: Sequence[Mapping[str, Any]],
        sampling: Mapping[str, Any],
    ) -> AsyncIterator[dict[str, Any]]:
        """Responses in the order in which they finish: `id`, `token_ids`, `log_probs`, `finish_reason`, and `versions`, a list
        of [version of the weights, tokens that they sampled].

        Args:
            version: the version of the weights that the server has, or had before a refit that began after the request was
                sent.
            requests: `id`, `prompt_token_ids` and `seed` of each response, and if it is continued `begun`, the number of tokens
                at the end of the prompt that belong to it.
            sampling: `temperature`, `top_p`, `max_tokens`, and if they are not 0 or empty `top_k`, `min_p`, `stop` and
                `experts`, with which each response also has `experts`.

        Raises:
            ServerFailed: the server failed, made no progress within the generation time-out, or did not send all responses.
            EngineError: the server refuses the request.
        """
        body = {"version": version, "requests": list(requests), "sampling": dict(sampling)}
        left = len(requests)
        try:
            async with http.stream(
                "POST", self._url("generate"), json=body, headers=self._headers(), timeout=self._generation_timeout
            ) as response:
                if response.status_code != httpx.codes.OK:
                    self._raise(response.status_code, (await response.aread()).decode(errors="replace"))
                async for text in response.aiter_lines():
                    line = json.loads(text)
                    if "error" in line:
                        raise ServerFailed(f"engine {self.index}: {line['error']}")
                    if "token_ids" in line:
                        left -= 1
                        yield line
        except (httpx.TransportError, httpx.InvalidURL, ValueError) as error:
            raise ServerFailed(f"engine {self.index} at {self.address}: {_describe(error)}") from error
        if left:
            raise ServerFailed(f"engine {self.index} at {self.address} ended its answer {left} responses early")

    def read_address(self) -> bool:
        """Read the address from its file. Returns whether it is known."""
        if not self._fixed:
            try:
                written = json.loads(address_path(self.run_dir, self.index).read_text())
            except (FileNotFoundError, ValueError):
                return False
            self.address, self.token = written["address"], written["token"]
        return True

    def _post(self, route: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        return self._call("POST", route, body or {}, timeout=timeout)

    def _call(self, method: str, route: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        try:
            response = httpx.request(
                method, self._url(route), json=body, headers=self._headers(), timeout=timeout, trust_env=False
            )
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServerFailed(f"engine {self.index} at {self.address}, {route}: {_describe(error)}") from error
        if response.status_code != httpx.codes.OK:
            self._raise(response.status_code, response.text)
        return response.json()

    def _url(self, route: str) -> str:
        return f"http://{self.address}/{route}"

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _raise(self, status: int, text: str) -> None:
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["detail"]
        if status == httpx.codes.UNAUTHORIZED:
            raise EngineError(
                f"engine {self.index} at {self.address} refuses the token: set {TOKEN_VARIABLE} to the server's token"
            )
        if status < httpx.codes.INTERNAL_SERVER_ERROR:
            raise EngineError(f"engine {self.index} at {self.address} refuses a request: {text}")
        raise ServerFailed(f"engine {self.index} at {self.address}: {text} (status {status})")


def connections() -> httpx.AsyncClient:
    """A client for `EngineServer.generate`. Each request has its own connection, without a limit on their number: a server may
    close an idle connection just as it is reused."""
    return httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


def address_path(run_dir: Path, index: int) -> Path:
    """The file to which a server writes its address and token."""
    return run_dir / "servers" / f"{index}.json"


def write_address(run_dir: Path, index: int, address: str, token: str) -> None:
    """Write the address file atomically, readable only by its owner."""
    path = address_path(run_dir, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"address": address, "token": token, "pid": os.getpid()}, file)
    os.replace(temporary, path)


def kill_group(group: int) -> None:
    """Kill every process of a process group (this one last, if it belongs to it) except the resource tracker of Python's
    multiprocessing, which removes the shared memory that the others leave, and then ends."""
    while True:
        members = [process for process in psutil.process_iter() if _is_victim(process, group)]
        for process in sorted(members, key=lambda process: process.pid == os.getpid()):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if not members:
            return
        time.sleep(_KILL_SECONDS)


def _is_victim(process: psutil.Process, group: int) -> bool:
    try:
        if os.getpgid(process.pid) != group or process.status() == psutil.STATUS_ZOMBIE:
            return False
        return not any("resource_tracker" in word for word in process.cmdline())
    except (psutil.Error, OSError):  # the process has ended, or belongs to another user
        return False


def last_line(log: Path) -> str:
    """The last error in a server's log, or else its last line."""
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line and "://" not in line]
        return (errors or lines or ["no output"])[-1]
    return "no output"


def engine_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A training rank's environment without the variables that describe the rank, which vLLM would mistake for its own, and
    without expandable segments, whose memory vLLM's workers cannot share (slurm/serve.sh does the same)."""
    result = {
        name: without_expandable_segments(value) if name in ALLOCATOR_VARIABLES else value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }
    return {name: value for name, value in result.items() if value or name not in ALLOCATOR_VARIABLES}


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no progress within the time-out ({type(error).__name__})"
    return " ".join(str(error).split()) or type(error).__name__

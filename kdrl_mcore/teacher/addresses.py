"""Where the servers of a teacher are: listed in the configuration, or found in RUN/teachers, where each writes its address."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from kdrl_mcore.config import Config, TeacherServerConfig
from kdrl_mcore.errors import ConfigError, TeacherError
from kdrl_mcore.teacher.servers import POLL_SECONDS

TOKEN_VARIABLE = "KDRL_TEACHER_TOKEN"
"""The environment variable with the bearer token that a server requires."""


def address_file(run_dir: Path, name: str, index: int) -> Path:
    """The file in which server `index` of a teacher writes its address and token."""
    return run_dir / "teachers" / f"{name}-{index}.json"


def write_address(run_dir: Path, name: str, index: int, url: str, token: str | None) -> None:
    """Write an address atomically, readable only by its owner."""
    path = address_file(run_dir, name, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump({"url": url, "token": token}, file)
    os.replace(temporary, path)


def find_addresses(config: Config, name: str, server: TeacherServerConfig) -> dict[str, str | None]:
    """The servers' URLs with their tokens, as far as they are known now.

    Raises:
        ConfigError: the file of the token cannot be read.
    """
    if server.urls:
        return dict.fromkeys((url.rstrip("/") for url in server.urls), _token(server.token_file))
    found = {}
    for index in range(server.replicas):
        path = address_file(Path(config.run.dir), name, index)
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            found[str(written["url"])] = written["token"]
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or of another program
            continue
    return found


def wait_for_addresses(
    config: Config, name: str, server: TeacherServerConfig, on_wait: Callable[[], None] = lambda: None
) -> dict[str, str | None]:
    """Wait until every server has written its address, at most `startup_timeout`.

    Raises:
        ConfigError: the file of the token cannot be read.
        TeacherError: a server has not written its address in this time.
    """
    find, deadline = partial(find_addresses, config, name, server), time.monotonic() + server.startup_timeout
    wanted = len(server.urls) or server.replicas
    while len(found := find()) < wanted:
        if time.monotonic() > deadline:
            missing = address_file(Path(config.run.dir), name, len(found))
            raise TeacherError(
                f"{wanted} servers of the teacher are expected and {len(found)} have written their addresses ({missing} is "
                f"missing) after {server.startup_timeout:g} s: start them with kdrl-serve-teacher, or set server.urls"
            )
        on_wait()
        time.sleep(POLL_SECONDS)
    return found


def _token(file: str | None) -> str | None:
    if file is None:
        return os.environ.get(TOKEN_VARIABLE)
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"server.token_file={file} cannot be read ({cause}): name a file with the token") from error

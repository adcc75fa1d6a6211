"""How the trainer handles servers that hang, disconnect, refuse or do not start, without vLLM."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from kdrl_mcore.errors import EngineError
from kdrl_mcore.rollout.vllm.client import EngineServer, Launch, ServerFailed, address_path, connections, write_address

LINE = {"id": "0.0", "versions": [[1, 1]], "token_ids": [5], "log_probs": [-1.0], "finish_reason": "stop"}
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(line: Any) -> bytes:
    text = json.dumps(line).encode() + b"\n"
    return f"{len(text):x}\r\n".encode() + text + b"\r\n"


@contextmanager
def answering(*pieces: bytes | float) -> Iterator[str]:
    """A server that answers each request with these bytes, with pauses (in seconds) in between, and disconnects; its
    address."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                for piece in pieces:
                    if isinstance(piece, bytes):
                        connection.sendall(piece)
                    else:
                        time.sleep(piece)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def generate(address: str, count: int = 2, timeout: float = 1.0, times: int = 1) -> list[dict[str, Any]]:
    server = EngineServer(0, Path("nowhere"), address=address, token="t", generation_timeout=timeout)

    async def run() -> list[dict[str, Any]]:
        async with connections() as http:
            return [line for _ in range(times) async for line in server.generate(http, 1, [{"id": "0.0"}] * count, {})]

    return asyncio.run(run())


def test_signs_of_progress_keep_a_slow_answer_alive() -> None:
    pause = 1.5  # with a time-out of 4: a busy machine may double each pause
    signs: list[bytes | float] = [chunk({}), pause, chunk({}), pause, chunk({}), pause]
    with answering(HEAD, *signs, chunk(LINE), b"0\r\n\r\n") as address:
        assert generate(address, count=1, timeout=4.0) == [LINE]


def test_a_connection_that_the_server_is_about_to_close_is_not_used_again() -> None:
    with answering(HEAD, chunk(LINE), b"0\r\n\r\n", 0.2) as address:  # the connection seems open meanwhile
        assert generate(address, count=1, times=2) == [LINE, LINE]


def test_an_engine_without_progress_hangs() -> None:
    with answering(HEAD, chunk(LINE), 5.0) as address, pytest.raises(ServerFailed, match="no progress within the time-out"):
        generate(address)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((HEAD, chunk(LINE)), "engine 0"),  # the connection breaks off
        ((HEAD, chunk(LINE), b"0\r\n\r\n"), "1 responses early"),
        ((HEAD, chunk({"error": "EngineDeadError: gone"}), b"0\r\n\r\n"), "EngineDeadError"),
        ((HEAD, b"3\r\n{x\n\r\n0\r\n\r\n"), "engine 0"),  # not JSON
        ((b"HTTP/1.1 503 x\r\nContent-Length: 4\r\n\r\ndead",), "dead .status 503"),
    ],
    ids=["cut", "early", "said", "garbage", "503"],
)
def test_a_broken_answer_is_a_failed_server(pieces: tuple[bytes, ...], message: str) -> None:
    with answering(*pieces) as address, pytest.raises(ServerFailed, match=message):
        generate(address)


def test_a_refusal_is_no_failed_server() -> None:
    body = b'{"detail": "asked for weight version 1, the engine has 0"}'
    head = f"HTTP/1.1 409 x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with answering(head + body) as address, pytest.raises(EngineError, match="refuses a request: asked for weight version 1"):
        generate(address)


def test_nobody_at_the_address_is_a_failed_server() -> None:
    with pytest.raises(ServerFailed, match=r"engine 0 at 127\.0\.0\.1:1"):
        generate("127.0.0.1:1")


def test_a_server_that_does_not_appear_in_time(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match=r"did not start within 0.5 s .it wrote no address."):
        EngineServer(3, tmp_path, startup_timeout=0.5).wait_until_ready()


def test_the_last_answers_of_a_server_that_was_told_to_end_are_not_those_of_its_successor() -> None:
    def answer(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    told_to_end, old, gone, new = b"null", b'{"version": 3}', None, b'{"version": null}'
    coming = [told_to_end, old, old, gone, gone, new]

    def serve() -> None:
        while coming:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                body = coming.pop(0)
                if body is not None:
                    connection.sendall(answer(body))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve, daemon=True).start()
        EngineServer(0, Path("nowhere"), address=f"127.0.0.1:{listener.getsockname()[1]}", token="t").restart()
        assert not coming


def test_a_server_that_ends_while_it_starts_says_why(tmp_path: Path) -> None:
    server = EngineServer(0, tmp_path, launch=Launch(("--no-such-option", "1")), startup_timeout=120)
    server.start()
    with pytest.raises(ServerFailed, match="ended while it started"):
        server.wait_until_ready()
    server.stop()
    assert server.pid is None


def test_the_address_file_is_whole_and_private(tmp_path: Path) -> None:
    write_address(tmp_path, 1, "127.0.0.1:5", "secret")
    path = address_path(tmp_path, 1)
    assert json.loads(path.read_text()) == {"address": "127.0.0.1:5", "token": "secret", "pid": os.getpid()}
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["1.json"]
    server = EngineServer(1, tmp_path)
    assert server.read_address() and (server.address, server.token) == ("127.0.0.1:5", "secret")

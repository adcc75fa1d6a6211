"""An engine server: vLLM in separate processes behind a small HTTP interface, so that a killed engine does not end a training
rank.

    kdrl-serve --run-dir RUN --index 0 --model HF_DIR [options]

Trainers start servers themselves. On other nodes they are started like this by hand or by srun, and
`rollout.vllm.placement=server` finds them in RUN/servers. Every route requires `Authorization: Bearer TOKEN`; received data are
never unpickled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse

from kdrl_mcore.config.engine_arguments import extra_arguments
from kdrl_mcore.data.tokenizers import load_tokenizer
from kdrl_mcore.errors import ConfigError, KdrlError
from kdrl_mcore.model.families import read_architecture
from kdrl_mcore.resilience.interrupt import block_ignored_stop_signals
from kdrl_mcore.rollout.vllm.adapter import Engine, EngineSettings, Finished, check_extra, end_group_with
from kdrl_mcore.rollout.vllm.client import TOKEN_VARIABLE, write_address
from kdrl_mcore.rollout.vllm.options import FLAGS, parser

_SIGN_SECONDS = 1.0  # between two reports of progress in a stream


class SampleRequest(TypedDict):
    """One response to sample. The last `begun` tokens of the prompt belong to a response that is continued."""

    id: str
    prompt_token_ids: list[int]
    seed: int
    begun: int


class GenerateBody(TypedDict):
    """The body of /generate; `sampling` holds arguments of vLLM's SamplingParams."""

    version: int | None
    requests: list[SampleRequest]
    sampling: dict[str, Any]


class WeightsBody(TypedDict):
    """The body of /weights; `spec` describes where the engine's workers find the refit's writers, `unfinished` how unfinished
    responses continue (`Engine.receive_weights`)."""

    version: int
    spec: dict[str, Any]
    unfinished: str


@dataclass
class _Served:
    """The server's state.

    Attributes:
        usable: whether the weights can be used: not while asleep, during a refit, or after one that failed.
        version: the version of the engine's weights; None for those of the model directory, or for unusable ones.
        replaced: the previous version, if responses continue when the weights change, because requests that were sent before
            the change name it.
        changing: whether new weights are being received, for which responses wait.
        parts: the number of parts of responses that the engine has produced since it started.
    """

    usable: bool
    version: int | None = None
    replaced: int | None = None
    changing: bool = False
    parts: int = 0

    def has(self, version: int | None) -> bool:
        """Whether a request for weights of this version is answered."""
        return self.usable and (version == self.version or (version is not None and version == self.replaced))


class _Routes:
    """The routes of one engine, and the state that they share."""

    def __init__(self, engine: Engine, settings: EngineSettings, stop: Callable[[], None]) -> None:
        self._engine, self._stop = engine, stop
        self._max_model_len = settings.max_model_len
        self._state = _Served(usable=settings.load_format != "dummy" and not settings.lora_rank)

    async def health(self) -> dict[str, Any]:
        """The version of the weights, and whether they can be used."""
        if self._engine.dead:
            raise HTTPException(503, "vLLM's engine process has died")
        await self._engine.check_health()
        return {"version": self._state.version, "usable": self._state.usable}

    async def generate(self, request: Request) -> StreamingResponse:
        """Sample responses; see `_stream`."""
        body: GenerateBody = await request.json()
        if not self._state.has(body["version"]):
            have = self._state.version if self._state.usable else "no usable weights"
            raise HTTPException(409, f"asked for weight version {body['version']}, the engine has {have}")
        limit = self._max_model_len - body["sampling"]["max_tokens"]
        for each in body["requests"]:
            if not 0 < len(each["prompt_token_ids"]) <= limit:
                length = len(each["prompt_token_ids"])
                raise HTTPException(
                    400, f"request {each['id']}: a prompt of {length} tokens, but only 1 to {limit} leave room for a response"
                )
        return StreamingResponse(self._stream(body), media_type="application/x-ndjson")

    async def weights(self, request: Request) -> dict[str, Any]:
        """Receive the weights of a refit."""
        body: WeightsBody = await request.json()
        state, continues = self._state, body["unfinished"] != "wait"
        state.usable, state.changing = state.usable and continues, continues
        try:
            workers = await self._engine.receive_weights(body["spec"], body["version"], body["unfinished"])
        except Exception as error:  # vLLM wraps its worker's error in many types; the trainer decides what to do
            state.usable = False
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        finally:
            state.changing = False
        state.replaced = state.version if continues and state.version != body["version"] else None
        state.version, state.usable = body["version"], True
        return {"version": body["version"], "workers": workers}

    async def sleep(self) -> dict[str, bool]:
        """Free GPU memory."""
        gone = await self._engine.sleep()
        if gone:
            self._state.usable = False
        return {"gone": gone}

    async def wake(self, request: Request) -> None:
        """Allocate GPU memory again."""
        await self._engine.wake((await request.json())["tags"])

    async def stop(self) -> None:
        """End the server."""
        self._stop()

    async def _stream(self, body: GenerateBody) -> AsyncIterator[str]:
        """A line for each finished response, and an empty object for each second in which the engine sampled or waited for new
        weights."""
        results: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        seen = self._state.parts
        tasks = [asyncio.create_task(self._sample(each, body["sampling"], results)) for each in body["requests"]]
        for task in tasks:
            task.add_done_callback(lambda _: results.put_nowait(None))
        try:
            left = len(tasks)
            while left:
                try:
                    line = await asyncio.wait_for(results.get(), _SIGN_SECONDS)
                except TimeoutError:
                    if self._state.parts > seen or self._state.changing:
                        seen = self._state.parts
                        yield "{}\n"
                    continue
                if line is not None:
                    yield json.dumps(line) + "\n"
                    continue
                left -= 1
                failed = next((task for task in tasks if task.done() and task.exception()), None)
                if failed is not None:
                    yield json.dumps({"error": f"{type(failed.exception()).__name__}: {failed.exception()}"}) + "\n"
                    return
        finally:  # if the client has gone or a request failed, vLLM drops the unfinished requests
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(
        self, request: SampleRequest, sampling: dict[str, Any], results: asyncio.Queue[dict[str, Any] | None]
    ) -> None:
        """Sample one response, count its parts, and put it into `results`."""
        name = f"{request['id']}-{secrets.token_hex(4)}"  # vLLM needs names that it has never seen
        begun, prompt = request.get("begun", 0), request["prompt_token_ids"]
        async for out in self._engine.generate(name, prompt, request["seed"], sampling, begun):
            self._state.parts += 1
            if isinstance(out, Finished):
                results.put_nowait({"id": request["id"], **vars(out)})


def make_app(engine: Engine, settings: EngineSettings, token: str, stop: Callable[[], None]) -> FastAPI:
    """The application with all routes, which require the token.

    Args:
        stop: ends the server.
    """
    app, routes = FastAPI(openapi_url=None), _Routes(engine, settings, stop)

    @app.middleware("http")
    async def authorize(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return Response("wrong or missing token", status_code=401)
        return await proceed(request)

    app.get("/health")(routes.health)
    app.post("/generate")(routes.generate)
    app.post("/weights")(routes.weights)
    app.post("/sleep")(routes.sleep)
    app.post("/wake")(routes.wake)
    app.post("/stop")(routes.stop)
    return app


def main(arguments: list[str]) -> int:
    """`serve` with the options of a command line."""
    return serve(parser().parse_args(arguments))


def serve(options: argparse.Namespace) -> int:
    """Serve until asked to stop, or until the parent process ends.

    Args:
        options: those of `options.parser`.
    """
    block_ignored_stop_signals()  # vLLM's processes set their own handlers
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    if options.parent:
        end_group_with(options.parent)
    try:
        settings = _settings(options)
    except KdrlError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    token = os.environ.pop(TOKEN_VARIABLE, None) or secrets.token_urlsafe(32)
    listener = socket.create_server((options.host, options.port))
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(settings, token, listener, Path(options.run_dir), options.index))
    return 0


class _Server(uvicorn.Server):
    """Installs no signal handlers: whoever started the process decides what signals do."""

    def capture_signals(self) -> Any:
        """See uvicorn."""
        return contextlib.nullcontext()


async def _serve(settings: EngineSettings, token: str, listener: socket.socket, run_dir: Path, index: int) -> None:
    engine = Engine(settings)
    server = _Server(uvicorn.Config(lambda: app, factory=True, log_level="warning"))

    def stop() -> None:
        server.should_exit = True

    app: FastAPI = make_app(engine, settings, token, stop)
    watching = asyncio.create_task(_announce(server, engine, token, listener, run_dir, index))
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
        engine.shutdown()


async def _announce(
    server: uvicorn.Server, engine: Engine, token: str, listener: socket.socket, run_dir: Path, index: int
) -> None:
    """Write the address once the server answers; later end the server if vLLM's processes die."""
    while not server.started:
        await asyncio.sleep(0.05)
    host, port = listener.getsockname()[:2]
    write_address(run_dir, index, f"{host}:{port}", token)
    while not engine.dead:
        await asyncio.sleep(1.0)
    server.should_exit = True


def _settings(options: argparse.Namespace) -> EngineSettings:
    if not Path(options.model).is_dir():
        raise ConfigError(f"--model {options.model} is not a folder: name an HF model directory")
    extra = extra_arguments(options.extra, "--extra")
    check_extra(extra, "--extra")
    tokenizer = load_tokenizer(options.model)
    return EngineSettings(
        model=options.model,
        vocab_size=options.vocab_size or tokenizer.vocab_size,
        stop_ids=tuple(sorted(tokenizer.eos_ids)),
        tokenizer=tokenizer.fast,
        extra=extra,
        **{name: getattr(options, name) for name in FLAGS}
        | {"max_model_len": min(options.max_model_len, read_architecture(options.model).context_length)},
    )


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python would take seconds to tear down vLLM's modules

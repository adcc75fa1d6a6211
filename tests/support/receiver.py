"""An engine server without an engine: it receives weights as vLLM's workers do and keeps them in a dictionary.

python -m tests.support.receiver WORKERS [cuda]     prints its port, then serves until its input ends

With `cuda`, each worker has a paper GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl_mcore.rollout.vllm.receiver import WeightReceiver
from tests import paper_cuda
from tests.support import ROOT
from tests.support.hf_folders import all_tensors


class DictWorker(WeightReceiver):
    """A worker whose model is a dictionary."""

    def __init__(self, rank: int, ranks: int, device: str = "cpu") -> None:
        super().__init__(rank, ranks, torch.device("cpu") if device == "cpu" else torch.device(device, rank))
        self.tensors: dict[str, Tensor] = {}
        self.die_at: str | None = None
        self.stop_at: str | None = None

    def load_received(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.tensors = {}
        for name, tensor in weights:
            if name == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == self.stop_at:
                threading.Event().wait()
            self.tensors[name] = tensor


class RemoteError(Exception):
    """What the server reports as an error."""


class DictServer:
    """The client of a receiver, as a rank of the trainer uses it."""

    def __init__(self, index: int, port: int) -> None:
        self.index, self.address = index, f"127.0.0.1:{port}"

    def receive_weights(self, version: int, spec: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self.post("weights", {"version": version, "spec": spec})

    def post(self, route: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(f"http://{self.address}/{route}", json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise RemoteError(error.read().decode()) from error


class Process:
    """A receiver in a process, which it starts."""

    def __init__(self, workers: int, device: str = "cpu") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.receiver", str(workers), device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def client(self) -> DictServer:
        return DictServer(0, self.port)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def main(num_workers: int, device: str = "cpu") -> None:
    """Serve."""
    if device == "cuda":
        paper_cuda.install()
    torch.set_num_threads(1)
    workers = [DictWorker(rank, num_workers, device) for rank in range(num_workers)]
    pool = ThreadPoolExecutor(num_workers)
    state: dict[str, Any] = {"version": None}

    def answer(route: str, body: dict[str, Any]) -> Any:
        if route == "weights":
            state["version"] = None
            results = list(pool.map(lambda worker: worker.receive_weights(body["spec"]), workers))
            state["version"] = body["version"]
            return results
        if route == "save":
            for worker in workers:
                save_file(
                    {name: tensor.cpu() for name, tensor in worker.tensors.items()},
                    f"{body['folder']}/worker{worker.rank}.safetensors",
                )
        if route == "order":
            return list(workers[0].tensors)
        if route == "fault":
            for worker in workers:
                vars(worker).update(body)
        return state["version"]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                code, reply = 200, json.dumps(answer(self.path.strip("/"), body))
            except Exception as error:
                code, reply = 500, str(error)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])


def assert_holds(receiver: Process, hf: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Both workers hold the tensors of an HF folder, byte for byte, and no others. The tensors came layer by layer, because an
    engine keeps the tensors of a layer until it has the last of them."""
    receiver.client().post("save", {"folder": str(folder)})
    expected = all_tensors(hf)
    layers = re.findall(r"\.layers\.(\d+)\.", " ".join(receiver.client().post("order", {})))
    assert layers == sorted(layers, key=int)
    for worker in range(2):
        got = load_file(folder / f"worker{worker}.safetensors")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            wanted = tensor if dtype is None else tensor.to(dtype)
            assert (got[name].dtype, got[name].shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(got[name].view(-1).view(torch.uint8), wanted.view(-1).view(torch.uint8)), name

"""A small Hugging Face hub on this machine, with the routes that downloading a snapshot and uploading a folder need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    """The files of a folder, as a commit holds them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def use_hub(address: str, cache: Path, *, offline: bool = False) -> ExitStack:
    """Set `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` in this process, whatever it has already imported, until closed."""
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    stack = ExitStack()
    stack.enter_context(patch.object(huggingface_hub.hf_api.api, "endpoint", address))
    url = address + "/{repo_id}/resolve/{revision}/{filename}"
    hub = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": offline}
    data = {"HF_ENDPOINT": address, "HF_DATASETS_CACHE": cache / "datasets", "HF_HUB_OFFLINE": offline}
    for module, values in ((constants, hub), (datasets.config, data)):
        for name, value in values.items():
            stack.enter_context(patch.object(module, name, value))
    return stack


class HubServer:
    """A context manager that serves repositories, `org/name` or `datasets/org/name`, from memory.

    Attributes:
        address: the value for `HF_ENDPOINT`.
        asked: the requests so far, such as `GET /path`, in order.
        gated: repositories that nobody may read.
        private: repositories that were made private.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self._commits: dict[str, dict[str, Files]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str, files: Mapping[str, bytes]) -> str:
        """Make a commit, which becomes the newest of `main`; returns its hash."""
        commits = self._commits.setdefault(repository, {})
        digest = hashlib.sha1(repr((repository, len(commits), sorted(files.items()))).encode()).hexdigest()
        commits[digest] = dict(files)
        return digest

    def make(self, repository: str) -> bool:
        """Make an empty repository; returns False if it exists already."""
        new = not self.has(repository)
        self._commits.setdefault(repository, {})
        return new

    def find(self, repository: str, revision: str | None) -> tuple[str, Files] | None:
        """A commit and its files; None if there is no such revision."""
        commits = self._commits[repository]
        digest = next(reversed(commits), None) if revision in (None, "main") else revision
        return None if digest not in commits else (str(digest), commits[str(digest)])

    def has(self, repository: str) -> bool:
        """Whether there is such a repository."""
        return repository in self._commits


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def _get(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} /{path}")
        if path.startswith("api/"):
            kind, *parts = path.split("/")[1:]
            repository, rest = "/".join(parts[:2]), parts[2:]
            repository = repository if kind == "models" else f"{kind}/{repository}"
            revision = rest[1] if rest else None
            found = self._find(repository, revision)
            if found is None:
                return
            digest, files = found
            tree = [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()]
            siblings = [{"rfilename": name} for name in files]
            about = {"id": "/".join(parts[:2]), "sha": digest, "siblings": siblings, "private": False, "tags": []}
            self._answer(200, tree if rest[:1] == ["tree"] else about)
            return
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self._find(repository, revision)
        if found is None:
            return
        digest, files = found
        if name not in files:
            self._fail(404, "EntryNotFound")
            return
        self._send(200, files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": digest})

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"POST /{path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in self.hub.gated:
                self._fail(403, "")
                return
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(repository)
            made = self.hub.make(repository)
            self._answer(200 if made else 409, {"url": f"{self.hub.address}/{repository}"})
            return
        _, _, owner, name, action, _ = path.split("/")
        repository = f"{owner}/{name}"
        if action == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in names]
            self._answer(200, {"files": modes})
            return
        rows = [json.loads(line) for line in body.splitlines()]
        added = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in rows if row["key"] == "file"}
        digest = self.hub.commit(repository, added)
        self._answer(200, {"commitUrl": f"{self.hub.address}/{repository}/commit/{digest}", "commitOid": digest})

    def _find(self, repository: str, revision: str | None) -> tuple[str, Files] | None:
        if not self.hub.has(repository):
            self._fail(404, "RepoNotFound")
        elif repository in self.hub.gated:
            self._fail(403, "GatedRepo")
        elif (found := self.hub.find(repository, revision)) is None:
            self._fail(404, "RevisionNotFound")
        else:
            return found
        return None

    def _answer(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"Content-Type": "application/json", "X-Error-Code": code})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _oid(data: bytes) -> str:
    """Git's hash of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

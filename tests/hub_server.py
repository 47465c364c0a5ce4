"""A hub of its own on loopback: the HTTP API that huggingface_hub speaks, made-up repositories, and faults on demand.

What it serves: repository info and file listings by revision, files with ranges, gates by bearer token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_up_token"
_API = re.compile(r"^/api/(datasets|models)/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?(/.*)?$")
_FILE = re.compile(r"^(/datasets)?/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """The commits of a repository (sha -> files by path), its branches and tags, and who may read it."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def push(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Commit `files` on a branch and return the commit."""
        text = json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in files.items()}, sort_keys=True)
        sha = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def commit(self, revision: str) -> str:
        return revision if revision in self.commits else self.refs.get(revision, "")


@dataclass
class Fault:
    """What happens to the next `times` requests whose path matches: a status, or the body cut after some bytes."""

    path: str
    status: int = 0
    cut: int = 0
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)


class Hub:
    """Repositories by kind and name; `requests` lists what was asked: method, path, range, token."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str, str]] = []
        self.url = ""

    def repository(self, name: str, kind: str = "dataset") -> Repository:
        return self.repositories.setdefault((kind, name), Repository())

    def fault(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on a port of its own until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        server.hang_up()


class _Server(ThreadingHTTPServer):
    """A server that leaves no client a connection when it ends: kept ones would be answered on."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on the test's console."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked, token = self.headers.get("Range", ""), self.headers.get("Authorization", "")
        self.hub.requests.append((self.command, path, asked, token))
        fault = self.hub.fault(f"{self.command} {path}")
        if fault and fault.status:
            self._send(fault.status, b"{}", dict(fault.headers))
        elif match := _API.match(urlsplit(self.path).path):
            kind, name, what, revision, _ = match.groups()
            self._api(kind.removesuffix("s"), name, what or "revision", unquote(revision or "main"))
        elif match := _FILE.match(urlsplit(self.path).path):
            prefix, name, revision, file = match.groups()
            self._file("dataset" if prefix else "model", name, unquote(revision), unquote(file), fault)
        else:
            self._send(404, b"{}")

    def _found(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            # As the hub does: it does not tell strangers whether a repository is missing or private.
            signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._error(404 if signed_in else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repository.commit(revision)
        if not commit:
            self._error(404, "RevisionNotFound", "Invalid rev id")
            return None
        return repository, commit

    def _api(self, kind: str, name: str, what: str, revision: str) -> None:
        if (found := self._found(kind, name, revision)) is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        if what == "tree":
            entries: list[dict[str, Any]] = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in sorted(files.items())
            ]
            self._send(200, json.dumps(entries).encode())
            return
        info = {"id": name, "sha": commit, "private": False, "gated": "auto" if repository.gated else False}
        about = {**info, "siblings": [{"rfilename": path} for path in files], "tags": [], "downloads": 0, "likes": 0}
        self._send(200, json.dumps(about).encode())

    def _file(self, kind: str, name: str, revision: str, path: str, fault: Fault | None) -> None:
        if (found := self._found(kind, name, revision)) is None:
            return
        repository, commit = found
        token = self.headers.get("Authorization")
        if repository.gated and token != f"Bearer {TOKEN}":
            self._error(403 if token else 401, "GatedRepo", f"Access to {kind} {name} is restricted.")
            return
        data = repository.commits[commit].get(path)
        if data is None:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, cut=fault.cut if fault else 0)

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), said)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut] if cut else body)
        if cut:
            self.close_connection = True

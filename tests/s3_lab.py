"""The S3 lab: a real SeaweedFS, started once per test run on loopback and stopped by its own process id."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.labs import lab_missing

LAB = Path(__file__).parents[1] / "infra" / "s3" / "lab.sh"


@dataclass(frozen=True)
class S3Lab:
    """A running server. `environment` holds what a client process needs: the endpoint and the lab's keys."""

    environment: dict[str, str]
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def port(self) -> int:
        return int(self.environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])

    def fresh_url(self) -> str:
        """The URL of an empty store."""
        return f"s3://moegrid/test-{next(self._numbers)}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Lab]:
    home = tmp_path_factory.mktemp("s3-lab")
    environment = {"WEED": str(Path(sys.executable).parent / "weed"), **os.environ, "MOEGRID_LAB": str(home)}
    started = subprocess.run([LAB, "up"], env=environment, capture_output=True, text=True, timeout=120, check=False)
    if started.returncode:
        lab_missing("S3", started.stderr.strip() or "it did not start")
    try:
        yield S3Lab(dict(line.split("=", 1) for line in started.stdout.split()))
    finally:
        subprocess.run([LAB, "down", "--wipe"], env=environment, check=True, timeout=60)


@pytest.fixture
def s3(s3_server: S3Lab, monkeypatch: pytest.MonkeyPatch) -> S3Lab:
    """The lab, with this process's environment pointing at it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


class Proxy:
    """A TCP proxy before a server that can be cut and restored: what a failing network looks like to a client."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.limit: int | None = None  # cut a connection after this many bytes towards the server
        self.swallow = 0  # so many answers never reach the client
        self.restore()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restore(self) -> None:
        """Accept connections."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and drop the open ones."""
        listener, self._listener = self._listener, None
        if listener:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for side in list(self._open):
            self._close(side)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open |= {client, server}
            for source, sink, towards in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, towards), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, towards: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                passed += len(data)
                if towards and self.limit is not None and passed > self.limit:
                    break
                if not towards and self.swallow:
                    self.swallow -= 1
                    break
                sink.sendall(data)
        self._close(source)
        self._close(sink)

    def _close(self, side: socket.socket) -> None:
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)
        side.close()
        self._open.discard(side)


@pytest.fixture
def proxy(s3: S3Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before the lab, with this process's environment pointing at the proxy."""
    middle = Proxy(s3.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", middle.endpoint)
    yield middle
    middle.cut()

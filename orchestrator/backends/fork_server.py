"""A process with its imports done that forks a child for each job that it is asked for.

    python -m orchestrator.backends.fork_server SOCKET PREPARE CALL

PREPARE and CALL are dotted paths: the one imports, once, the other gets a job's arguments in its child and returns its
exit code. Requests are JSON lines over the file descriptor SOCKET, each answered by its child's process id. The other
end belongs to a driver: once it is closed nothing more is taken, and the server ends with its last child.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.backends import host
from orchestrator.ending import ends_at_once, with_code
from orchestrator.registry import load


@dataclass(frozen=True, slots=True)
class Request:
    """One job: the files of its process id, of its end and of its log, and the arguments that the call gets."""

    pid: str
    exit: str
    log: str
    arguments: tuple[str, ...]

    def line(self) -> bytes:
        """Return the request as it goes over the socket."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Request:
        """Return the request of a line."""
        found: Mapping[str, str] = json.loads(line)
        return cls(found["pid"], found["exit"], found["log"], tuple(found["arguments"]))


def threads() -> int:
    """Return how many threads this process has: a fork takes one of them along, and locks of all."""
    return len(os.listdir("/proc/self/task"))


class ForkServer:
    """Forks, waits for what it has forked, and writes down how each ended."""

    def __init__(self, control: socket.socket) -> None:
        self._control, self._rest = control, b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, Request, int]] = {}  # by pidfd: process id, request, kills for memory

    def run(self) -> Request | None:
        """Serve; return None in the server, when all is over, and a request in the child that it is for."""
        self._control.sendall(b"ready\n")
        open_ = True
        while open_ or self._children:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._reap(key.fd)
                    continue
                received = self._control.recv(1 << 16)
                open_ = bool(received)
                if not open_:
                    self._selector.unregister(self._control)
                *lines, self._rest = (self._rest + received).split(b"\n")
                for line in lines:
                    if (mine := self._fork(Request.parse(line))) is not None:
                        return mine
        return None

    def _fork(self, request: Request) -> Request | None:
        """Fork; return the request in the child."""
        if threads() > 1:
            sys.exit("another thread has been started: its locks would never open in a child")
        before = host.oom_kills()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            self._become(request)
            return request
        descriptor = os.pidfd_open(pid)
        self._selector.register(descriptor, selectors.EVENT_READ)
        self._children[descriptor] = (pid, request, before)
        with contextlib.suppress(OSError):  # the driver died meanwhile; others find the child by its record
            self._control.sendall(f"{pid}\n".encode())
        return None

    def _become(self, request: Request) -> None:
        """Make the child a session of its own, with the job's log, before any work is done."""
        os.setsid()
        self._selector.close()
        self._control.close()
        for descriptor in self._children:
            os.close(descriptor)
        record = Path(request.pid)
        fresh = record.with_name(f"{record.name}.tmp")
        fresh.write_text(Path("/proc/self/stat").read_text())
        fresh.replace(record)
        for target, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, request.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        ):
            opened = os.open(path, flags, 0o644)
            os.dup2(opened, target)
            os.close(opened)
        os.dup2(1, 2)

    def _reap(self, descriptor: int) -> None:
        pid, request, before = self._children.pop(descriptor)
        self._selector.unregister(descriptor)
        os.close(descriptor)
        host.reap(pid, before, Path(request.exit))


def main(words: Sequence[str]) -> int:
    """Prepare, serve, and in a child do a job; return the exit code of whichever this process is."""
    descriptor, prepare, call = words
    ends_at_once()
    load(prepare, "a fork server")()
    function = load(call, "a fork server")
    # What is there now is never looked at again by the collector: its pages stay those of the server.
    gc.collect()
    gc.freeze()
    request = ForkServer(socket.socket(fileno=int(descriptor))).run()
    if request is None:
        return with_code(0)
    sys.argv = [call, *request.arguments]
    code: int = function(list(request.arguments))
    return with_code(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

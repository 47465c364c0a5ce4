"""The fork server of a driver: how it is started, asked for a job, and done without."""

from __future__ import annotations

import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.backends import host
from orchestrator.backends.fork_server import Request

# A fork takes milliseconds; a server that has not answered by then hangs.
ANSWER_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Targets:
    """What a server imports before its first job, and what it calls for each: dotted paths, `module:function`."""

    prepare: str = "jobs.warm:prepare"
    call: str = "jobs.run:main"


class WarmWorker:
    """One fork server. Nothing waits for its imports: until they are done, and once it has failed, it takes no job."""

    def __init__(self, targets: Targets, environment: Mapping[str, str], folder: Path) -> None:
        """Start it in `folder`, where its log is; raises OSError."""
        self._socket, theirs = socket.socketpair()
        self._ready = False
        with theirs, open(folder / "worker.log", "wb") as log:
            words = (str(theirs.fileno()), targets.prepare, targets.call)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.backends.fork_server", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.started = host.start_time(self._process.pid)
        self._socket.settimeout(ANSWER_SECONDS)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it takes no more jobs."""
        return self._process.poll() is not None

    @property
    def ready(self) -> bool:
        """Whether its imports are done."""
        if not self._ready and not self.ended and select.select([self._socket], [], [], 0)[0]:
            self._ready = self._line() == "ready"
        return self._ready and not self.ended

    def start(self, request: Request) -> int:
        """Return the process id of a job's child; 0 when there is none and never will be."""
        try:
            self._socket.sendall(request.line())
            answer = self._line()
        except OSError:
            answer = ""
        if answer:
            return int(answer)
        # Dead, or it hangs: once it is killed it forks nothing more.
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        try:
            return int(Path(request.pid).read_text().split(maxsplit=1)[0])
        except (OSError, ValueError, IndexError):
            return 0

    def _line(self) -> str:
        """Return the next line that it says, "" when there is none."""
        found = b""
        while not found.endswith(b"\n"):
            received = self._socket.recv(1)
            if not received:
                return ""
            found += received
        return found.decode().strip()

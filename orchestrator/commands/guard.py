"""`python -m orchestrator.commands.guard PARENT COMMAND...`: a server that ends with its parent, whole.

A server's own children outlive a signal that only its first process gets. So the guard gives it a process group, and
ends the whole group on SIGTERM, SIGINT or SIGHUP, and when the guard's own parent is gone, killed or not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

POLL_SECONDS = 0.2
# Time to end in before the group is killed; answers that are still being sent are cut off then.
GRACE_SECONDS = 5.0
ENDINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server until it ends or this process is told to; return its exit code, or 128 + the signal's number."""
    got: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        got.append(number)

    before = {number: signal.signal(number, handle) for number in ENDINGS}
    guarded = [sys.executable, "-m", "orchestrator.commands.guard", str(os.getpid()), *command]
    try:
        process = subprocess.Popen(guarded, env=dict(environment), start_new_session=True)
        while process.poll() is None:
            if got:
                process.terminate()
                process.wait()
                return 128 + got[0]
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def guard(command: Sequence[str], parent: int) -> int:
    """Run `command` as long as the process `parent` lives and no signal comes; return its exit code."""
    got: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        got.append(number)

    for number in ENDINGS:
        signal.signal(number, handle)
    child = subprocess.Popen(command, start_new_session=True)
    while child.poll() is None and not got and os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    _end_group(child)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """End every process of the child's group: politely, then for good."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end:
            child.poll()
            os.killpg(child.pid, 0)  # raises when the group is empty
            time.sleep(POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


if __name__ == "__main__":
    sys.exit(guard(sys.argv[2:], int(sys.argv[1])))

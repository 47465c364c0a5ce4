"""A server that is shown to somebody ends with whoever started it, with all the processes it has started itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A server with a worker, as uvicorn is one of mlflow's; one that is busy does not end when it is asked to.
WORKER = """
import os, signal, sys, time
if sys.argv[2]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + "/tmp", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + "/tmp", sys.argv[1] + "/worker")
time.sleep(600)
"""
SERVER = f"""
import os, subprocess, sys
open(sys.argv[1] + "/server", "w").write(str(os.getpid()))
subprocess.run([sys.executable, "-c", {WORKER!r}, *sys.argv[1:]])
"""
PARENT = "import os, sys; from orchestrator.commands import guard; sys.exit(guard.serve(%r, os.environ))"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody reaps."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def started(folder: Path, stubborn: str = "") -> tuple[subprocess.Popen[bytes], list[int]]:
    """Start the server under guard; return the process that was asked for it and the ids of server and worker."""
    command = [sys.executable, "-c", SERVER, str(folder), stubborn]
    parent = subprocess.Popen([sys.executable, "-c", PARENT % (command,)], cwd=ROOT, start_new_session=True)
    assert until((folder / "worker").exists)
    return parent, [int((folder / name).read_text()) for name in ("server", "worker")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_server_and_worker_end_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    parent, processes = started(tmp_path)
    os.kill(parent.pid, number)
    code = parent.wait(60)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert until(lambda: not any(map(alive, processes)))


def test_a_worker_that_does_not_end_is_killed(tmp_path: Path) -> None:
    parent, processes = started(tmp_path, stubborn="yes")
    parent.terminate()
    assert parent.wait(60) == 128 + signal.SIGTERM
    assert until(lambda: not any(map(alive, processes)))


def test_a_server_that_ends_by_itself_gives_its_exit_code() -> None:
    code = [sys.executable, "-c", "raise SystemExit(7)"]
    assert subprocess.run([sys.executable, "-c", PARENT % (code,)], cwd=ROOT, check=False).returncode == 7

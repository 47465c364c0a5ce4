"""Processes of this machine, told apart from recycled process ids by their start time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from orchestrator.errors import MoegridError

NICENESS = 10

_PROC = Path("/proc")


@lru_cache(maxsize=1)
def host_id() -> str:
    """Return a name for this machine, boot and process-id namespace: process ids mean something only inside one."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()[:8]
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        boot = namespace = ""
    return ":".join((socket.gethostname(), boot, namespace))


def start_time(pid: int) -> str:
    """Return when process `pid` started (opaque, comparable for equality), "" when there is no such process.

    A zombie still has its start time: its parent has not read its exit code yet.
    """
    if _PROC.joinpath("self").exists():
        fields = _stat(pid)
        return fields[19] if fields else ""
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def alive(pid: int, started: str) -> bool:
    """Is the process that had this id and start time still there (running or waiting for its parent)?"""
    return pid > 0 and bool(started) and start_time(pid) == started


def is_zombie(pid: int) -> bool:
    """Has the process ended without its parent having read the exit code?"""
    fields = _stat(pid)
    return bool(fields) and fields[0] == "Z"


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command name, which may hold blanks and parentheses."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def cores() -> int:
    """Return the cores this process may use: its affinity, or less where a container has a quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def memory_gb() -> float:
    """Return the memory of this machine or container in GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / 2**30


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed for want of memory."""
    try:
        lines = Path("/sys/fs/cgroup/memory.events").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def reap(pid: int, oom_kills_before: int, record: Path) -> int:
    """Read the exit of a child that has ended, end what it left behind, and return its code, negative = its signal.

    `record` gets code (None where a signal ended it), signal, oom, rss in GiB and cpu in seconds. It says the former
    before the zombie goes: who sees no process finds how it ended.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # the zombie still holds the id
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert found is not None
    killed = 0 if found.si_code == os.CLD_EXITED else found.si_status
    oom = killed == signal.SIGKILL and oom_kills() > oom_kills_before
    ending = {"code": None if killed else found.si_status, "signal": killed, "oom": oom, "rss": 0.0}
    write_json(record, ending)
    usage = os.wait4(pid, 0)[2]
    write_json(record, ending | {"rss": usage.ru_maxrss / 2**20, "cpu": usage.ru_utime + usage.ru_stime})
    return -killed if killed else found.si_status


def give_way(pid: int) -> None:
    """Let jobs go before a process of this user that nobody waits for: it leads a session of its own.

    Linux schedules sessions as groups, whose own niceness counts where several want a core.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a record that nobody ever sees half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def run_directory(*, make: bool = True) -> Path:
    """Return the directory in which this machine's drivers keep track of their processes, private to the user.

    Without `make` it need not exist. Raises MoegridError when it belongs to somebody else.
    """
    named = os.environ.get("MOEGRID_RUN_DIR")
    path = Path(named) if named else Path(tempfile.gettempdir()) / f"moegrid-{os.getuid()}"
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.exists() and path.stat().st_uid != os.getuid():
        raise MoegridError(
            f"{path} belongs to another user",
            cause="processes are recorded there, so it must be yours alone",
            hint="set MOEGRID_RUN_DIR to a directory of your own",
        )
    return path.resolve()

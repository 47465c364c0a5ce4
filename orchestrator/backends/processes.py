"""The ranks of one job on one node, as child processes of whatever supervises them there.

The children die with their supervisor: the kernel sends them SIGTERM, so that they save their state and stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends import host
from orchestrator.errors import EXIT_DONE, EXIT_PREEMPTED
from orchestrator.spec.cell import HUGE_PAGES, THREADS
from orchestrator.spec.launchers import outside

# Seconds that the other ranks get after the first one has ended: they may still be saving, unless it failed.
RANK_PATIENCE, FAILED_PATIENCE = 300.0, 20.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class NodeJob:
    """What one node has to start: `processes` ranks of `command`, the first of them rank `first` of `world`."""

    attempt: str
    command: tuple[str, ...]
    processes: int
    first: int
    world: int
    cores: int
    gpus: int
    environment: Mapping[str, str] = field(default_factory=dict)
    project: str = ""
    log_directory: str = ""


class Processes:
    """Starts the ranks of a node at once; call it from the thread that lives as long as the supervisor."""

    def __init__(self, job: NodeJob, master: tuple[str, int]) -> None:
        """`master` is the address and port at which rank 0 listens."""
        self.master = master
        self._job = job
        folder = Path(job.log_directory or Path(tempfile.gettempdir()) / f"moegrid-{os.getuid()}" / "logs")
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / f"{job.attempt}.{job.first}.log"
        self._oom_kills = host.oom_kills()
        self._first_end = 0.0
        self._rss = 0.0
        with self._log.open("ab") as output:
            self._ranks = [self._start(rank, output.fileno()) for rank in range(job.processes)]

    def state(self) -> dict[str, Any]:
        """Return {"codes": exit code per rank or None, "rss": GiB, "oom": bool, "host", "log"}; negative = signal."""
        codes = [rank.poll() for rank in self._ranks]
        if any(code is not None for code in codes) and None in codes:
            self._first_end = self._first_end or time.monotonic()
            if time.monotonic() - self._first_end > patience(codes):
                self.stop(signal.SIGKILL)
        for rank in self._ranks:
            if rank.returncode is None:
                self._rss = max(self._rss, _peak_rss(rank.pid))
        killed = any(code == -signal.SIGKILL for code in codes if code is not None)
        return {
            "codes": codes,
            "rss": self._rss,
            "oom": killed and host.oom_kills() > self._oom_kills,
            "host": socket.gethostname(),
            "log": str(self._log),
        }

    def stop(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def output(self, limit: int) -> bytes:
        """Return the last `limit` bytes of the ranks' stdout and stderr."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - limit))
            return log.read()

    def _start(self, local_rank: int, output: int) -> subprocess.Popen[bytes]:
        job = self._job
        environment = {
            **dict([HUGE_PAGES]),
            **outside(os.environ),
            **dict.fromkeys(THREADS, str(job.cores)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
        }
        if not job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if job.project:
            path = (job.project, environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        environment.update(outside(job.environment))
        if job.world > 1:
            environment |= {
                "RANK": str(job.first + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(job.world),
                "MASTER_ADDR": self.master[0],
                "MASTER_PORT": str(self.master[1]),
            }
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=self._log.parent,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def patience(codes: Sequence[int | None]) -> float:
    """Return how long the ranks that still run may go on after another one has ended."""
    well = all(code in (None, EXIT_DONE, EXIT_PREEMPTED) for code in codes)
    return RANK_PATIENCE if well else FAILED_PATIENCE


def ending(codes: Sequence[int]) -> int:
    """Return the exit code of a job from those of its ranks: rank 0's, unless another one failed by itself."""
    if codes[0] != 0 or not any(codes):
        return codes[0]
    return next((code for code in codes if code > 0), min(codes))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _peak_rss(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), 0.0)


def free_place(address: str) -> tuple[str, int]:
    """Return an address of this machine with a port that is free there now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])

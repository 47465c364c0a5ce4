"""Drivers of this machine: who submitted a batch, and whether that process still lives.

A batch's name starts with its driver's id, so a claim alone tells whose it is. The registry is advisory: a driver that
is not in it (another machine's) counts as unknown, and its leases decide.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import time
from pathlib import Path

from orchestrator.backends import host

KEEP_SECONDS = 30 * 86400.0


class Driver:
    """This process as the driver of a grid."""

    def __init__(self) -> None:
        self.id = f"{time.strftime('%y%m%d%H%M%S', time.gmtime())}{secrets.token_hex(3)}"
        self._batches = itertools.count()
        host.run_directory()
        _registry().mkdir(exist_ok=True)
        self._path = _registry() / f"{self.id}.json"
        pid = os.getpid()
        self._path.write_text(json.dumps({"host": host.host_id(), "pid": pid, "started": host.start_time(pid)}))

    def new_batch(self) -> str:
        """Return a batch name that was never used before."""
        return f"{self.id}-{next(self._batches)}"


def is_dead(driver: str) -> bool:
    """Is it certain that this driver does not run any more? False for a driver of another machine."""
    return _lives_here(driver) is False


def is_alive(driver: str) -> bool:
    """Is it certain that this driver runs on this machine?"""
    return _lives_here(driver) is True


def _lives_here(driver: str) -> bool | None:
    """Whether a driver of this machine runs; None when this machine does not know it, or its record is damaged."""
    try:
        record = json.loads(_registry().joinpath(f"{driver}.json").read_text())
        if record["host"] != host.host_id():
            return None
        return _runs(int(record["pid"]), str(record["started"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def sweep() -> None:
    """Forget drivers that ended long ago."""
    for path in _registry().glob("*.json"):
        if time.time() - path.stat().st_mtime > KEEP_SECONDS and is_dead(path.stem):
            path.unlink(missing_ok=True)


def _runs(pid: int, started: str) -> bool:
    return host.alive(pid, started) and not host.is_zombie(pid)


def _registry() -> Path:
    return host.run_directory(make=False) / "drivers"

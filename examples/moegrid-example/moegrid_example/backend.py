"""A backend: every job a process of this machine, a few at a time, for a site file that says `backend: processes`.

It forgets its jobs with its driver, which a backend for real clusters must not: see `find`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moegrid.extend import Batch, Handle, JobState, node_command, node_environment


@dataclass(frozen=True)
class ProcessesSite:
    """The settings of a site file beside `backend`, all with defaults."""

    slots: int = field(default=1, metadata={"least": 1})
    folder: str = "."


class Processes:
    name = "processes"

    def __init__(self, site: ProcessesSite) -> None:
        self.site = site
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def admit(self, wanted: Sequence[Any]) -> list[bool]:
        """Say for each request, in order of priority, whether it should be submitted now."""
        running = sum(child.poll() is None for child in self.children.values())
        return [running + index < self.site.slots for index in range(len(wanted))]

    def submit(self, batch: Batch) -> dict[str, Handle]:
        """Start the jobs of `batch`; return the handle of each attempt."""
        return {job.attempt: self._start(batch, job) for job in batch.jobs}

    def _start(self, batch: Batch, job: Any) -> Handle:
        environment = {**node_environment(job), **batch.environment}
        with open(self._log(job.attempt), "ab") as log:
            child = subprocess.Popen(
                node_command(batch, job), env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self.children[job.attempt] = child
        return Handle(job.attempt, batch.name, str(child.pid))

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        """Return the state of each attempt; "elsewhere" is what this driver cannot see."""
        states = {}
        for handle in handles:
            child = self.children.get(handle.attempt)
            code = child.poll() if child else None
            phase = "elsewhere" if child is None else "running" if code is None else "ended"
            exit_code = code if code is not None and code >= 0 else None
            states[handle.attempt] = JobState(phase, exit_code, signal=-code if code is not None and code < 0 else 0)
        return states

    def find(self, batch: str) -> dict[str, Handle]:
        """Return the jobs of a batch by its name: a scheduler is asked, whoever submitted them."""
        return {a: Handle(a, batch, str(c.pid)) for a, c in self.children.items() if a.rpartition("-")[0] == batch}

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        """Ask jobs to save their states and stop, or end them at once."""
        for handle in handles:
            child = self.children.get(handle.attempt)
            if child is not None and child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL if now else signal.SIGTERM)

    def forget(self, handles: Sequence[Handle]) -> None:
        """Drop the records of jobs whose end has been written to the store."""
        for handle in handles:
            self.children.pop(handle.attempt, None)

    def log(self, handle: Handle) -> Path | None:
        return self._log(handle.attempt)

    def _log(self, attempt: str) -> Path:
        return Path(self.site.folder) / f"{attempt}.log"


def open_site(settings: ProcessesSite, store: str) -> Processes:
    """Return the backend of a site for jobs of the store with this URL."""
    return Processes(settings)

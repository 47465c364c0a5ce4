"""What every site can do: start a batch of jobs, say how they are, find them again by name, stop them.

The scheduler is the truth about processes; the store is the truth about results. A backend keeps nothing that
another driver, started later, could not ask the scheduler for again by the batch's name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.errors import EXIT_UNREACHABLE, MoegridError
from orchestrator.resources import ROOT
from orchestrator.spec.cell import HUGE_PAGES, THREADS, Resources
from orchestrator.spec.launchers import outside

# Settings of a site file that are the driver's business, not the backend's.
DRIVER_KEYS = frozenset({"backend", "tick_seconds", "lease_seconds"})
QUEUED, RUNNING, ENDED, ABSENT, ELSEWHERE = "queued", "running", "ended", "absent", "elsewhere"


class SchedulerUnreachable(MoegridError):
    """The scheduler did not answer: its jobs go on, and it is asked again later."""

    exit_code = EXIT_UNREACHABLE


@dataclass(frozen=True, slots=True)
class Job:
    """One process (group) that a scheduler starts: attempt `<batch>-<index>` of a chain of stages."""

    attempt: str
    index: int
    label: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of `submit` starts. `name` is unique for ever, so that a lost answer can be looked up by it.

    `more`: its driver stays, and submits others when these have ended.
    """

    name: str
    store: str
    jobs: tuple[Job, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    more: bool = False


@dataclass(frozen=True, slots=True)
class Handle:
    """How the scheduler calls one job. `details` is plain JSON of the backend's own."""

    attempt: str
    batch: str
    id: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"attempt": self.attempt, "batch": self.batch, "id": self.id, "details": dict(self.details)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Handle:
        return cls(data["attempt"], data["batch"], data["id"], data.get("details", {}))

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> Handle | None:
        """Return the handle, None when `data` is none (damaged): the scheduler is asked by the batch's name then."""
        texts = (data.get("attempt"), data.get("batch"), data.get("id"))
        if not all(isinstance(text, str) for text in texts) or not isinstance(data.get("details", {}), Mapping):
            return None
        return cls.from_json(data)


@dataclass(frozen=True, slots=True)
class JobState:
    """What the scheduler says of one job.

    `phase`: queued | running | ended | absent (the scheduler does not know it) | elsewhere (cannot be seen from
    this machine). `exit_code` is None where nobody saw the process end; `signal` is the signal that ended it, 0 = none.
    `reason` is the scheduler's own word (TIMEOUT, NODE_FAIL, PREEMPTED, OUT_OF_MEMORY, ...).
    """

    phase: str
    exit_code: int | None = None
    signal: int = 0
    reason: str = ""
    host: str = ""
    max_rss_gb: float = 0.0


def node_arguments(batch: Batch, job: Job) -> tuple[str, ...]:
    """Return what `python -m jobs.run` is told: which job of which batch in which store it is."""
    return ("--store", batch.store, "--batch", batch.name, "--job", str(job.index))


def node_command(batch: Batch, job: Job, python: str = sys.executable) -> tuple[str, ...]:
    """Return the command of a job: started once, it starts the other processes of its node itself.

    Exit code 0: done. SIGTERM lets it save its state and stop.
    """
    return (python, "-m", "jobs.run", *node_arguments(batch, job))


def node_environment(job: Job) -> dict[str, str]:
    """Return the environment of a job on a machine like this one; that of its batch comes on top."""
    environment = outside(os.environ)
    inherited = environment.get("PYTHONPATH", "")
    return {
        **dict([HUGE_PAGES]),
        **environment,
        **dict.fromkeys(THREADS, str(job.resources.cores)),
        "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), inherited) if part),
        "PYTHONSAFEPATH": "1",  # a folder named jobs where the user stands is not ours
        "PYTHONUNBUFFERED": "1",
    }


class Backend(Protocol):
    """One site. Methods raise `SchedulerUnreachable` when the scheduler cannot be reached."""

    name: str

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        """Say for each request, in order of priority, whether it should be submitted now."""
        ...

    def submit(self, batch: Batch) -> dict[str, Handle]:
        """Start the jobs of `batch`; return the handle of each attempt."""
        ...

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        """Return the state of each attempt, in one call to the scheduler where it can."""
        ...

    def find(self, batch: str) -> dict[str, Handle]:
        """Ask the scheduler for the jobs of a batch by name: what a submission without an answer really started."""
        ...

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        """Ask jobs to checkpoint and stop (SIGTERM), or end them at once."""
        ...

    def forget(self, handles: Sequence[Handle]) -> None:
        """Drop the scheduler-side records of jobs whose end has been written to the store."""
        ...

    def log(self, handle: Handle) -> Path | None:
        """Return the file with the job's stdout and stderr, where this machine can read it."""
        ...

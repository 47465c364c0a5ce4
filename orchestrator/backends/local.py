"""Jobs as processes of this machine, under a budget of cores, memory and GPUs.

Each job is its own session, so it outlives a killed driver. Before it does any work it leaves its process id and start
time in the run directory of this machine; from there any other driver finds, polls and stops it. A process id is never
signalled unless its start time is the recorded one. The budget of cores and memory is shared by all drivers of one
store; GPUs are never given twice, whichever the store.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.backends import host
from orchestrator.backends.base import (
    ABSENT,
    ELSEWHERE,
    ENDED,
    RUNNING,
    Batch,
    Handle,
    Job,
    JobState,
    SchedulerUnreachable,
    node_arguments,
    node_environment,
)
from orchestrator.backends.fork_server import Request
from orchestrator.backends.warm import Targets, WarmWorker
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import Resources

# The shell leaves its process id (the job's own: exec keeps it) before anything else can happen.
_LAUNCH = (
    'record=$1; shift; { cat /proc/$$/stat 2>/dev/null || echo "$$"; } > "$record.tmp" '
    '&& mv "$record.tmp" "$record" && exec "$@"'
)
_STARTING_SECONDS = 10.0
_KEEP_SECONDS = 7 * 86400.0
_SUFFIXES = (".log", ".exit", ".pid", ".json")
PROGRAM = (sys.executable, "-m", "jobs.run")
# What other drivers read of a job's record; one without it is damaged.
_RECORDED = frozenset({"attempt", "batch", "store", "host", "driver", "time", "gpus", "cores", "memory_gb", "log"})


@dataclass(frozen=True, slots=True)
class LocalSite:
    """What a site file (`infra/sites/local.yaml`) says about a machine; 0 = all that it has."""

    cores: int = field(default=0, metadata={"least": 0})
    memory_gb: float = field(default=0.0, metadata={"least": 0})
    gpus: int | None = field(default=None, metadata={"least": 0})
    warm: bool = True


@dataclass(frozen=True, slots=True)
class Budget:
    """What the jobs of this machine may use together."""

    cores: int
    memory_gb: float
    gpus: int

    @classmethod
    def of_machine(cls, *, cores: int = 0, memory_gb: float = 0.0, gpus: int | None = None) -> Budget:
        """Fill what is not given (0, None) from the environment (MOEGRID_CORES, ...), then from the machine.

        Raises MoegridError for a value that is not a number.
        """
        devices = len(list(Path("/dev").glob("nvidia[0-9]*"))) if gpus is None else gpus
        cores = int(_number("MOEGRID_CORES", cores)) or host.cores()
        memory = _number("MOEGRID_MEMORY_GB", memory_gb) or host.memory_gb()
        gpus = int(_number("MOEGRID_GPUS", devices))
        return cls(cores, memory, gpus)

    @staticmethod
    def demand(resources: Resources) -> tuple[int, float, int]:
        """Return the cores, GiB and GPUs that a job takes."""
        return resources.cores * resources.processes, resources.memory_gb, resources.gpus

    def admits(self, held: Iterable[Resources], wanted: Sequence[Resources]) -> list[bool]:
        """Say in order of priority what fits beside jobs that hold some; what is larger than everything runs alone."""
        taken = [self.demand(resources) for resources in held]
        cores, memory, gpus = (sum(column) for column in zip(*taken, strict=True)) if taken else (0, 0.0, 0)
        return self.fits((int(cores), float(memory), int(gpus)), wanted)

    def fits(self, used: tuple[int, float, int], wanted: Sequence[Resources]) -> list[bool]:
        """Say the same where these cores, GiB and GPUs are `used`."""
        cores, memory, gpus = used
        answers = []
        for resources in wanted:
            more_cores, more_memory, more_gpus = self.demand(resources)
            within = cores + more_cores <= self.cores and memory + more_memory <= self.memory_gb
            alone = cores == 0 and gpus + more_gpus <= self.gpus
            answers.append((within and gpus + more_gpus <= self.gpus) or alone)
            if answers[-1]:
                cores, memory, gpus = cores + more_cores, memory + more_memory, gpus + more_gpus
        return answers


def _number(variable: str, otherwise: float) -> float:
    text = os.environ.get(variable, "")
    try:
        return float(text) if text else otherwise
    except ValueError:
        raise MoegridError(f"{variable}={text!r} is not a number", hint=f"unset {variable}") from None


class LocalBackend:
    """The embedded default: subprocesses under a resource budget."""

    name = "local"

    def __init__(
        self,
        *,
        budget: Budget | None = None,
        store: str = "",
        program: Sequence[str] = PROGRAM,
        warm: Targets | None = None,
    ) -> None:
        """`store` is the URL of the store whose jobs share the budget; "" = of all stores.

        Jobs without a GPU are forked from a `warm` process, once it is known that more are to come.
        """
        self.budget = budget or Budget.of_machine()
        self._records = host.run_directory(make=False) / "jobs"
        self._store = store
        self._program = tuple(program)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._oom_kills: dict[str, int] = {}
        self._targets = warm if self._program == PROGRAM and hasattr(os, "pidfd_open") else None
        self._worker: WarmWorker | None = None
        self._forked: set[str] = set()
        self._stays = False

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        """Admit what fits into the free part of the budget; what is larger than the whole budget runs alone."""
        live = self._live()
        gpus = sum(len(record["gpus"]) for record in live)
        mine = [record for record in live if self._store in ("", record["store"])]
        used = (sum(record["cores"] for record in mine), sum(record["memory_gb"] for record in mine), gpus)
        return self.budget.fits(used, wanted)

    def submit(self, batch: Batch) -> dict[str, Handle]:
        self._stays |= batch.more
        return {job.attempt: self._start(batch, job) for job in batch.jobs}

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        return {handle.attempt: self._state(handle) for handle in handles}

    def find(self, batch: str) -> dict[str, Handle]:
        found = {}
        for path in sorted(self._records.glob(f"{batch}-*.json")):
            record = _read(path)
            pid, started = self._process(path.stem)
            while not pid and time.time() - record.get("time", 0.0) < _STARTING_SECONDS / 10:
                time.sleep(0.01)  # its driver may have died a moment ago, before the shell could leave its id
                pid, started = self._process(path.stem)
            if record.get("batch") == batch and record.keys() >= _RECORDED and pid:
                found[path.stem] = self._handle(record, pid, started)
        return found

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        for handle in handles:
            pid, started = handle.details.get("pid", 0), handle.details.get("started", "")
            if handle.details.get("host") == host.host_id() and host.alive(pid, started):
                _signal(pid, started, signal.SIGKILL if now else signal.SIGTERM)

    def forget(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            if handle.details.get("host") == host.host_id():
                for suffix in _SUFFIXES:
                    self._records.joinpath(f"{handle.attempt}{suffix}").unlink(missing_ok=True)

    def log(self, handle: Handle) -> Path | None:
        path = Path(handle.details.get("log", ""))
        return path if path.is_file() else None

    def ended(self) -> int:
        """Return how many processes that this driver started have ended and were not reaped yet."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        children = list(self._children.values())
        fresh = sum(os.waitid(os.P_PID, child.pid, options) is not None for child in children)
        return fresh + sum(self._records.joinpath(f"{attempt}.exit").exists() for attempt in self._forked)

    def _live(self) -> list[dict[str, Any]]:
        """Return the records of all jobs of this user that live on this machine; drop those of long gone ones."""
        live = []
        for path in self._records.glob("*.json"):
            record = _read(path)
            if record.get("host") != host.host_id() or not record.keys() >= _RECORDED:
                continue
            pid, started = self._process(path.stem)
            age = time.time() - record["time"]
            starting = not pid and age < _STARTING_SECONDS and not path.with_suffix(".exit").exists()
            if starting or (host.alive(pid, started) and not host.is_zombie(pid)):
                live.append(record)
            elif age > _KEEP_SECONDS:
                for suffix in _SUFFIXES:
                    path.with_suffix(suffix).unlink(missing_ok=True)
        return live

    def _start(self, batch: Batch, job: Job) -> Handle:
        cores, memory, gpus = Budget.demand(job.resources)
        host.run_directory()
        log = self._records / f"{job.attempt}.log"
        record: dict[str, Any] = {
            "attempt": job.attempt,
            "batch": batch.name,
            "store": batch.store,
            "host": host.host_id(),
            "driver": [os.getpid(), host.start_time(os.getpid())],
            "time": time.time(),
            "cores": cores,
            "memory_gb": memory,
            "gpus": self._free_gpus(gpus),
            "log": str(log),
        }
        try:
            self._records.mkdir(exist_ok=True)
            if pid := self._forked_by(self._warm_worker(batch, job), record, batch, job):
                return self._handle(record, pid, host.start_time(pid))
            host.write_json(self._records / f"{job.attempt}.json", record)
            process_record = self._records / f"{job.attempt}.pid"
            self._oom_kills[job.attempt] = host.oom_kills()
            with open(log, "ab") as output:
                child = subprocess.Popen(
                    ["/bin/sh", "-c", _LAUNCH, "moegrid-job", str(process_record), *self._command(batch, job)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=self._records,
                    env=self._environment(batch, job, record["gpus"]),
                    start_new_session=True,
                )
        except OSError as error:
            raise SchedulerUnreachable(
                f"cannot start {job.label} on this machine",
                cause=str(error),
                hint="free disk space and processes, then run: moegrid resume",
            ) from error
        self._children[job.attempt] = child
        return self._handle(record, child.pid, host.start_time(child.pid))

    def _warm_worker(self, batch: Batch, job: Job) -> WarmWorker | None:
        """Return the process that may fork the job; start one where it does not stand ready yet.

        It starts beside the first jobs, which mostly prepare data, if others follow them; without that nobody knows
        whether the driver is gone in a moment, until it has seen the end of a job.
        """
        if self._targets is None or not self._stays or job.resources.gpus:
            return None
        if self._worker is None:
            self._worker = WarmWorker(self._targets, self._environment(batch, job, ()), self._records)
        elif self._worker.ended:
            self._targets = None  # it has failed once, and would again
        return self._worker if self._worker.ready else None

    def _forked_by(self, worker: WarmWorker | None, record: dict[str, Any], batch: Batch, job: Job) -> int:
        """Let the job be forked; return its process id, 0 when it was not."""
        if worker is None:
            return 0
        pid, end = (str(self._records / f"{job.attempt}{suffix}") for suffix in (".pid", ".exit"))
        # Who reads the exit code: it outlives this driver.
        parent = record | {"driver": [worker.pid, worker.started]}
        host.write_json(self._records / f"{job.attempt}.json", parent)
        Path(record["log"]).touch()
        found = worker.start(Request(pid, end, record["log"], node_arguments(batch, job)))
        if found:
            record |= parent
            self._forked.add(job.attempt)
        return found

    def _command(self, batch: Batch, job: Job) -> list[str]:
        return [*self._program, *node_arguments(batch, job)]

    def _environment(self, batch: Batch, job: Job, gpus: Sequence[int]) -> dict[str, str]:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus)}
        return {**node_environment(job), **visible, **batch.environment}

    def _free_gpus(self, count: int) -> list[int]:
        if not count:
            return []
        used = {gpu for record in self._live() for gpu in record["gpus"]}
        return [gpu for gpu in range(self.budget.gpus) if gpu not in used][:count]

    def _handle(self, record: Mapping[str, Any], pid: int, started: str) -> Handle:
        details = {"host": record["host"], "pid": pid, "started": started, "log": record["log"]}
        return Handle(record["attempt"], record["batch"], str(pid), details | {"driver": record["driver"]})

    def _process(self, attempt: str) -> tuple[int, str]:
        """Return the process id and start time that the job itself recorded, (0, "") when it has not (yet)."""
        try:
            text = self._records.joinpath(f"{attempt}.pid").read_text()
        except OSError:
            return 0, ""
        first = text.split(maxsplit=1)[:1]
        if not first or not first[0].isdigit():
            return 0, ""  # written this moment, or damaged
        pid = int(first[0])
        fields = text.rpartition(")")[2].split()
        return pid, fields[19] if len(fields) > 19 else host.start_time(pid)

    def _state(self, handle: Handle) -> JobState:
        details = handle.details
        if details.get("host") != host.host_id():
            return JobState(ELSEWHERE, host=str(details.get("host", "")).partition(":")[0])
        name = details["host"].partition(":")[0]
        self._reap(handle.attempt)
        pid, started = details.get("pid", 0), details.get("started", "")
        there = host.alive(pid, started)  # before its end is read, which is written while the process is there
        ended = _read(self._records / f"{handle.attempt}.exit")
        if ended:
            self._forked.discard(handle.attempt)
            reason = "OUT_OF_MEMORY" if ended["oom"] else ""
            return JobState(ENDED, ended["code"], ended["signal"], reason, name, ended["rss"])
        if there:
            # A zombie's exit code belongs to its parent; without a parent that lives, nobody will ever read it.
            orphan = host.is_zombie(pid) and not host.alive(*details["driver"])
            return JobState(ENDED if orphan else RUNNING, host=name)
        return JobState(ENDED if pid else ABSENT, host=name)

    def _reap(self, attempt: str) -> None:
        """Read a child's exit code, once, and record it for every driver."""
        child = self._children.get(attempt)
        if child is None or os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        record = self._records / f"{attempt}.exit"
        child.returncode = host.reap(child.pid, self._oom_kills.get(attempt, 0), record)
        self._stays = True
        del self._children[attempt]


def _signal(pid: int, started: str, number: int) -> None:
    """Signal the process that has this start time, whatever happens to its id in the meantime."""
    try:
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, number)
            return
        descriptor = os.pidfd_open(pid)
        try:
            if host.alive(pid, started):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        pass


def _read(path: Path) -> dict[str, Any]:
    """Return a record, {} when it is absent or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def open_site(settings: LocalSite, store: str) -> LocalBackend:
    """Return the backend of a site for jobs of the store with this URL."""
    budget = Budget.of_machine(cores=settings.cores, memory_gb=settings.memory_gb, gpus=settings.gpus)
    return LocalBackend(budget=budget, store=store, warm=Targets() if settings.warm else None)

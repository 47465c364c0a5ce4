"""Jobs as SLURM array tasks: the node gets a plain command, the scheduler keeps the truth about processes.

A batch becomes one `sbatch --array` per set of equal resources, called by the batch's name; the array task's number is
the job's index. submitit writes the submission file. A tick asks once with squeue and, for what the controller does not
hold as live any more, once with sacct, however many jobs there are.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from orchestrator.backends import slurm_records as records
from orchestrator.backends.base import (
    ABSENT,
    ELSEWHERE,
    ENDED,
    QUEUED,
    RUNNING,
    Batch,
    Handle,
    Job,
    JobState,
    SchedulerUnreachable,
)
from orchestrator.backends.slurm_records import OVER, REST, WAITING, Record, Refused
from orchestrator.backends.slurm_script import SlurmSite, array_name, load_submitit, log_path, ranges, script
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import Resources

NOT_MINE = 76
# Seconds for which accounting may say "running" of a job that the controller has forgotten.
ACCOUNTING_LAG = 120.0
# How long a requeued job rests: nodes compare whole seconds, and take a start in the one of the end for the old one.
REQUEUE_SECONDS = 2.5
# The job id, and the reason, of a job that sbatch refused.
REFUSED = "REFUSED"
# How far back a batch is looked for by its name.
FIND_SECONDS = 30 * 86400.0
# A batch with more jobs than an array may hold goes as several arrays, at most this many.
MOST_ARRAYS = 20
_OUT_OF_MEMORY = re.compile(r"oom[-_ ]kill|exceeded (job |step )?memory limit|out of memory handler", re.IGNORECASE)


class SlurmBackend:
    """One SLURM cluster, through its own commands."""

    name = "slurm"

    def __init__(
        self,
        site: SlurmSite | None = None,
        *,
        log_directory: Path | None = None,
        program: Sequence[str] = (),
    ) -> None:
        """`log_directory` must be shared with the nodes; `program` replaces `python -m jobs.run`."""
        self.site = site or SlurmSite()
        named = self.site.log_directory or os.environ.get("MOEGRID_SLURM_LOGS")
        self._logs = Path(named).expanduser() if named else log_directory or Path.home() / ".cache/moegrid/slurm"
        python = self.site.python or sys.executable
        self._program = tuple(program) or (*shlex.split(self.site.container), python, "-m", "jobs.run")
        self._live: set[str] = set()
        self._unseen: dict[str, float] = {}
        self._held: set[str] = set()  # attempts that could not be launched
        self._requeued: dict[tuple[str, int, int], float] = {}
        self._accepted = False
        load_submitit()  # it takes a tenth of a second: now, not at the first submission

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        """Admit all: queueing is the scheduler's trade. `max_jobs` bounds how many jobs of this driver it holds."""
        limit = self.site.max_jobs
        return [not limit or len(self._live) + index < limit for index in range(len(wanted))]

    def submit(self, batch: Batch) -> dict[str, Handle]:
        handles: dict[str, Handle] = {}
        groups: dict[tuple[Resources, int], list[Job]] = {}
        for job in batch.jobs:
            groups.setdefault((job.resources, job.index // self.site.max_array), []).append(job)
        for number, ((resources, chunk), jobs) in enumerate(groups.items()):
            tasks = [job.index - chunk * self.site.max_array for job in jobs]
            text = script(self.site, batch, resources, chunk=chunk, tasks=tasks, program=self._program, logs=self._logs)
            ranks = resources.nodes * resources.processes
            try:
                job_id = self._sbatch(batch, f"submission-{number}.sh", text)
            except Refused as refused:
                if not self._accepted:
                    raise  # nothing was ever accepted: the site file is wrong, not these jobs
                for task in tasks:
                    handle = self._refuse(batch.name, chunk, task, refused)
                    handles[handle.attempt] = handle
                continue
            self._accepted = True
            for task in tasks:
                handle = self._handle(batch.name, job_id, chunk, task, ranks, time.time())
                handles[handle.attempt] = handle
        self._live |= {attempt for attempt, handle in handles.items() if _is_slurm(handle)}
        return handles

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        states = {
            handle.attempt: JobState(ENDED, 1, reason=REFUSED) if _is_refused(handle) else JobState(ELSEWHERE)
            for handle in handles
        }
        handles = [handle for handle in handles if _is_slurm(handle)]
        queued = self._queued(handles)
        self._start_requeued(queued.values())
        known = {handle.attempt: _mine(queued, handle) for handle in handles}
        over = [handle for handle in handles if (found := known[handle.attempt]) is None or found.state in OVER]
        past = self._past(over, needed=any(known[handle.attempt] is None for handle in over)) if over else {}
        self._confirm(one for one in over if known[one.attempt] is None and not _ended(_mine(past, one)))
        for handle in handles:
            states[handle.attempt] = self._state(handle, known[handle.attempt], _mine(past, handle))
            if states[handle.attempt].phase in (ENDED, ABSENT):
                self._live.discard(handle.attempt)
                self._unseen.pop(handle.attempt, None)
        return states

    def find(self, batch: str) -> dict[str, Handle]:
        timeout = self.site.command_timeout
        names = [array_name(batch, chunk) for chunk in range(MOST_ARRAYS)]
        earliest = time.time() - FIND_SECONDS
        past = records.accounts(timeout=timeout, names=names, since=_clock(earliest))
        found: dict[str, Handle] = {}
        for record in [*past.values(), *records.queue(timeout=timeout, names=names)]:
            if record.name in names and record.task >= 0:
                chunk = names.index(record.name)
                handle = self._handle(batch, record.job, chunk, record.task, record.processes, earliest)
                found[handle.attempt] = handle
        return found

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        handles = [handle for handle in handles if _is_slurm(handle)]
        if not handles:
            return
        if now:
            self._scancel([], handles)
            return
        queued = self._queued(handles)
        running = [handle for handle in handles if (found := _mine(queued, handle)) and found.state not in WAITING]
        waiting = [handle for handle in handles if handle not in running]
        self._scancel([], waiting)
        # A single process is the batch step itself; ranks are a step of their own, and their srun must not be told.
        self._scancel(["--batch", "--signal=TERM"], [one for one in running if one.details["processes"] <= 1])
        self._scancel(["--signal=TERM"], [one for one in running if one.details["processes"] > 1])

    def forget(self, handles: Sequence[Handle]) -> None:
        """SLURM keeps and drops its own records; only what it holds for good is taken out of the queue."""
        self._scancel([], [handle for handle in handles if handle.attempt in self._held])
        self._held.difference_update(handle.attempt for handle in handles)

    def log(self, handle: Handle) -> Path | None:
        path = Path(handle.details.get("log", ""))
        return path if path.is_file() else None

    def check(self) -> str:
        """Return in words what this cluster offers; raises MoegridError with the remedy when it cannot be used."""
        timeout = self.site.command_timeout
        chosen = [f"--partition={self.site.partition}"] if self.site.partition else []
        lines = records.call(["sinfo", "--noheader", "--format=%P %D %T %G", *chosen], timeout=timeout).splitlines()
        if not lines:
            raise MoegridError(
                f"partition {self.site.partition or '(default)'} has no nodes",
                hint="name one of `sinfo`'s in the site file (partition)",
            )
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            records.accounts(timeout=timeout, jobs={"1"})
        except OSError as error:
            raise MoegridError(f"cannot write {self._logs}", cause=str(error), hint="set log_directory") from error
        except SchedulerUnreachable as away:
            hint = "ask for access to accounting"
            raise SchedulerUnreachable("sacct does not work", cause=away.cause, hint=hint) from away
        return "; ".join(lines[:3]) + (f"; and {len(lines) - 3} more lines of sinfo" if len(lines) > 3 else "")

    def _handle(self, batch: str, job_id: str, chunk: int, task: int, processes: int, submitted: float) -> Handle:
        index = task + chunk * self.site.max_array
        details = {
            "name": array_name(batch, chunk),
            "submitted": submitted,
            "processes": processes,
            "log": log_path(self._logs, batch, chunk, task),
        }
        return Handle(f"{batch}-{index}", batch, f"{job_id}_{task}", details)

    def _sbatch(self, batch: Batch, name: str, text: str) -> str:
        """Submit and return the array's job id. Secrets travel in sbatch's environment, never in the file."""
        path = self._logs / batch.name / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise MoegridError(
                f"cannot write {path}",
                cause=str(error),
                hint="name a directory that the nodes share as `log_directory` in infra/sites/slurm.yaml",
            ) from error
        environment = {**os.environ, **batch.environment}
        return records.submit(str(path), timeout=self.site.command_timeout, environment=environment)

    def _refuse(self, batch: str, chunk: int, task: int, refused: Refused) -> Handle:
        """Return the handle of a job that SLURM does not take (more memory than any node has): it ends at once."""
        handle = self._handle(batch, REFUSED, chunk, task, 1, time.time())
        Path(handle.details["log"]).write_text(f"{refused.cause}\n")
        return handle

    def _queued(self, handles: Sequence[Handle]) -> dict[tuple[str, int], Record]:
        jobs = {_place(handle)[0] for handle in handles}
        if not jobs:
            return {}
        found = records.queue(timeout=self.site.command_timeout, jobs=jobs)
        return {(record.job, record.task): record for record in found}

    def _past(self, handles: Sequence[Handle], *, needed: bool) -> dict[tuple[str, int], Record]:
        """Return what accounting knows; unless `needed`, the controller's own records will do while it is away."""
        since = _clock(min(handle.details["submitted"] for handle in handles) - 3600)
        jobs = {_place(handle)[0] for handle in handles}
        try:
            return records.accounts(timeout=self.site.command_timeout, jobs=jobs, since=since)
        except SchedulerUnreachable:
            if needed:
                raise
            return {}

    def _confirm(self, handles: Iterable[Handle]) -> None:
        """Ask the controller itself for jobs that squeue does not tell of: on its word alone nothing is done again."""
        held: dict[str, set[tuple[int, str]]] = {}
        for handle in handles:
            job, task = _place(handle)
            if job not in held:
                held[job] = records.held(job, timeout=self.site.command_timeout)
            name = handle.details["name"]
            if (task, name) in held[job] or (REST, name) in held[job]:
                raise SchedulerUnreachable(
                    f"squeue does not tell of job {handle.id}, which the controller holds",
                    hint="jobs go on, it is asked again; if it stays so, run squeue by hand",
                )

    def _state(self, handle: Handle, queued: Record | None, past: Record | None) -> JobState:
        if queued and queued.state in WAITING and records.HELD_FOR_GOOD.search(queued.reason):
            # Nothing but an administrator starts it again: a new attempt goes to another node.
            self._held.add(handle.attempt)
            return JobState(ENDED, reason="LAUNCH_FAILED", host=queued.nodes)
        if queued and queued.state not in OVER:
            phase = QUEUED if queued.state in WAITING else RUNNING
            return JobState(phase, reason=queued.reason if phase == QUEUED else "", host=queued.nodes)
        if queued is None and past and past.state not in OVER:
            # Accounting lags behind a controller that has forgotten the job; a record that stays so is never closed.
            since = self._unseen.setdefault(handle.attempt, time.monotonic())
            if time.monotonic() - since < ACCOUNTING_LAG:
                return JobState(RUNNING, host=past.nodes)
            return JobState(ENDED, host=past.nodes)
        end = queued or past
        if end is None:
            return JobState(ABSENT)
        code, number = records.ending(end)
        rss = past.rss if past else 0.0
        reason = "" if end.state == "COMPLETED" else end.state
        if number == signal.SIGKILL and self._ran_out_of_memory(handle):
            reason = "OUT_OF_MEMORY"
        restarts = max(end.restarts, past.restarts if past else 0)
        if code == NOT_MINE and restarts:
            # The first start died without a word and still holds the lease, which this restart therefore did not get.
            reason = "NODE_FAIL"
        return JobState(ENDED, code, number, reason, end.nodes, rss)

    def _ran_out_of_memory(self, handle: Handle) -> bool:
        """Look for the scheduler's own words in the log: a kill for memory may end as FAILED with signal 9."""
        path = self.log(handle)
        if path is None:
            return False
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16384))
            return bool(_OUT_OF_MEMORY.search(log.read().decode(errors="replace")))

    def _start_requeued(self, queued: Iterable[Record]) -> None:
        """Let requeued jobs start soon: SLURM holds them back for two minutes."""
        held = [record for record in queued if record.restarts and record.reason == "BeginTime" and record.task >= 0]
        now = time.monotonic()
        seen = {(record.job, record.task, record.restarts): now for record in held}
        self._requeued = seen | {place: since for place, since in self._requeued.items() if place in seen}
        waiting = [place for place, since in self._requeued.items() if now - since >= REQUEUE_SECONDS]
        if not waiting:
            return
        chosen = ",".join(f"{job}_{task}" for job, task, _ in sorted(waiting))
        with contextlib.suppress(SchedulerUnreachable, Refused):
            records.call(["scontrol", "update", f"JobId={chosen}", "StartTime=now"], timeout=self.site.command_timeout)

    def _scancel(self, options: Sequence[str], handles: Sequence[Handle]) -> None:
        tasks: dict[str, list[int]] = {}
        for handle in handles:
            job, task = _place(handle)
            tasks.setdefault(job, []).append(task)
        if not tasks:
            return
        chosen = [f"{job}_[{ranges(numbers)}]" for job, numbers in tasks.items()]
        records.cancel(["scancel", "--quiet", *options, *chosen], timeout=self.site.command_timeout)


def _is_refused(handle: Handle) -> bool:
    return handle.id.startswith(f"{REFUSED}_")


def _is_slurm(handle: Handle) -> bool:
    """Is this a job that SLURM took, or that of a cell which was begun at another site?"""
    return "name" in handle.details and not _is_refused(handle)


def _ended(record: Record | None) -> bool:
    return record is not None and record.state in OVER


def _place(handle: Handle) -> tuple[str, int]:
    job, _, task = handle.id.partition("_")
    return job, int(task)


def _mine(found: Mapping[tuple[str, int], Record], handle: Handle) -> Record | None:
    """Return the record of this job; another one under a recycled job id has another name."""
    job, task = _place(handle)
    record = found.get((job, task))
    if record is None:
        record = found.get((job, REST))
    return record if record and record.name == handle.details["name"] else None


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))


def open_site(settings: SlurmSite, store: str) -> SlurmBackend:
    """Return the backend of a site."""
    return SlurmBackend(settings)

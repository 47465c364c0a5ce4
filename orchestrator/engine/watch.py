"""The attempts in flight: which stages are busy, and what to do with an attempt that is over.

Who may call an attempt over: its own driver; any driver once that one is dead or the lease has run out. Everything done
about it can be done twice: failures are put if absent, claims are released by compare-and-swap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from orchestrator.backends.base import ABSENT, ELSEWHERE, ENDED, QUEUED, RUNNING, Backend, Handle, JobState
from orchestrator.engine import driver as drivers
from orchestrator.engine.driver import Driver
from orchestrator.engine.failures import HINTS, Verdict, classify, spoken, tail
from orchestrator.engine.journal import Journal, code_digest
from orchestrator.errors import EXIT_DONE, SPOKEN_END
from orchestrator.store import ClaimState
from orchestrator.store.attempts import Failure, batch_of, driver_of

SLOW_START = 20


@dataclass(frozen=True, slots=True)
class InFlight:
    """One attempt that works or waits for its turn."""

    attempt: str
    handle: Handle | None
    state: JobState | None


class Watch:
    """Follows attempts through claims and scheduler. Keeps only what it can ask for again."""

    def __init__(
        self,
        journal: Journal,
        backend: Backend,
        driver: Driver,
        *,
        stall_seconds: float,
        heal: Callable[[str], object] | None = None,
    ) -> None:
        """`heal` discards what must be made again because an artifact is damaged (default: that alone)."""
        self._journal = journal
        self._backend = backend
        self._driver = driver
        self._stall_seconds = stall_seconds
        self._heal = heal or journal.store.artifacts.heal
        self._stalled: dict[str, float] = {}
        self._over: set[str] = set()
        self._overdue: list[Handle] = []  # to be ended, all of a tick in one call
        self._finished: list[Handle] = []  # over and written down: to be forgotten, all of a tick in one call
        self._mine: dict[str, Handle] = {}
        self._left: dict[str, Handle] | None = None  # committed by jobs of other drivers, which were not forgotten
        self.flying: dict[str, InFlight] = {}
        self.stopping = False
        self.settled = 0  # attempts called over by the last `observe`
        self.outdated = False  # did that find or make artifacts other than those listed before it?

    def started(self, handles: Iterable[Handle]) -> None:
        """Follow jobs that this driver has just submitted."""
        for handle in handles:
            self._mine[handle.attempt] = handle
            self.flying[handle.attempt] = InFlight(handle.attempt, handle, None)

    @property
    def mine(self) -> list[Handle]:
        """Jobs in flight that this driver answers for: its own, and those of drivers that are dead."""
        return list(self._mine.values())

    def observe(self, claims: Mapping[str, ClaimState]) -> dict[str, str]:
        """Return the busy stages among those of `claims` (of stages without artifact), with their attempts.

        Attempts that are over are written down and their claims released on the way.
        """
        by_attempt: dict[str, list[str]] = {attempt: [] for attempt in self._mine}
        for stage, claim in claims.items():
            known = claim.attempt in self._over or claim.attempt in self._journal.recorded
            if claim.attempt and not (claim.released and known):
                by_attempt.setdefault(claim.attempt, []).append(stage)
        handles = self._handles(by_attempt)
        if self._left is None:
            self._left = self._leftovers()
        asked = {**self._left, **handles}
        states = self._backend.poll(list(asked.values())) if asked else {}
        busy: dict[str, str] = {}
        self.flying, self._overdue = {}, []
        self.settled, self.outdated = 0, False
        for attempt, stages in by_attempt.items():
            held = [claims[stage] for stage in stages]
            handle, state = handles.get(attempt), states.get(attempt, JobState(ABSENT))
            if self._is_over(attempt, state, held):
                given_back = bool(held) and all(claim.released for claim in held)
                self._settle(attempt, handle, state, stages, claims.keys(), given_back=given_back)
                continue
            if handle is not None and drivers.is_dead(driver_of(attempt)):
                self._mine[attempt] = handle
            self.flying[attempt] = InFlight(attempt, handle, state)
            busy.update(dict.fromkeys(stages, attempt))
        over = {attempt for attempt in self._left if states[attempt].phase not in (QUEUED, RUNNING)}
        self._finished += [self._left.pop(attempt) for attempt in over - handles.keys()]
        self._tell()
        return busy

    def _leftovers(self) -> dict[str, Handle]:
        """Return jobs of other drivers that are committed: a scheduler may hold their resources until it is told.

        Nobody else asks for them once those drivers are dead, as none of their stages is missing.
        """
        held: Callable[[], dict[str, Handle]] | None = getattr(self._backend, "held", None)
        found = {}
        for attempt, handle in held().items() if held is not None else ():
            job = self._journal.job(attempt) if driver_of(attempt) != self._driver.id else None
            if job is not None and all(self._journal.store.artifacts.get(key) is not None for key in job.keys):
                found[attempt] = handle
        return found

    def _tell(self) -> None:
        """End what is overdue and forget what is over; what the scheduler does not hear, it is told the next time."""
        if self._overdue:
            self._backend.cancel(self._overdue, now=True)
        if self._finished:
            self._backend.forget(self._finished)
            self._finished = []

    def _handles(self, attempts: Collection[str]) -> dict[str, Handle]:
        """Return the handles as they were written down, else as the scheduler knows the batch by its name."""
        handles, asked = {}, dict[str, dict[str, Handle]]()
        for attempt in attempts:
            handle = self._mine.get(attempt) or self._journal.handle(attempt)
            if handle is None:
                batch = batch_of(attempt)
                if batch not in asked:
                    asked[batch] = self._backend.find(batch)
                handle = asked[batch].get(attempt)
            if handle is not None:
                handles[attempt] = handle
        return handles

    def _is_over(self, attempt: str, state: JobState, held: list[ClaimState]) -> bool:
        live = any(claim.live for claim in held)
        released = bool(held) and all(claim.released for claim in held)
        owner = driver_of(attempt)
        if state.phase == ELSEWHERE:
            return not live
        if state.phase == ABSENT:
            # Claimed, but not (yet) started: its driver is at it, unless that one is dead.
            return not live or owner == self._driver.id or drivers.is_dead(owner)
        if state.phase == ENDED:
            # Only the parent of a process learns its exit code: leave it a moment to write that down.
            told = state.exit_code is not None or state.signal > 0
            return told or not live or not drivers.is_alive(owner) or owner == self._driver.id
        if state.phase == RUNNING and held and not live and not released:
            # A process that has not entered yet is slow to start, which on a busy machine is no fault.
            patience = self._stall_seconds * (1 if any(claim.entered for claim in held) else SLOW_START)
            return self._end_stalled(attempt, patience)
        self._stalled.pop(attempt, None)
        return False

    def _end_stalled(self, attempt: str, patience: float) -> bool:
        """A process is there but has not renewed its lease: wait for some more seconds, then it is to be ended."""
        since = self._stalled.setdefault(attempt, time.monotonic())
        if time.monotonic() - since > patience:
            self._overdue += self._handles([attempt]).values()
        return False

    def _settle(
        self,
        attempt: str,
        handle: Handle | None,
        state: JobState,
        stages: list[str],
        absent: Collection[str],
        *,
        given_back: bool,
    ) -> None:
        """Write down why an attempt that is over did not finish, and release what it still holds.

        `absent` had no artifact when they were last listed. `given_back`: its leases were released, by itself or by a
        driver that has written down why.
        """
        store = self._journal.store
        job = self._journal.job(attempt)
        keys = job.keys if job else stages
        missing = [key for key in keys if store.artifacts.get(key) is None]
        # Committed since, or listed by its name and damaged, as only a reader of it sees.
        self.outdated |= {key for key in keys if key in absent} != set(missing)
        entered = state.phase != ABSENT or self._journal.heartbeat(attempt) is not None
        # A submission that is damaged leaves the node's own word.
        known = job is not None or self._journal.report(attempt) is not None
        if missing and known and entered and not (given_back and self._ended_well(attempt, state)):
            memory = float(job.resources.get("memory_gb", 0.0)) if job else 0.0
            self._record(attempt, handle, state, missing, memory)
        for key in missing:
            self._journal.evict(key, attempt)
        if handle is not None:
            self._finished.append(handle)
        self.settled += 1
        self._over.add(attempt)
        self._mine.pop(attempt, None)

    def _ended_well(self, attempt: str, state: JobState) -> bool:
        """Did an attempt whose end nobody saw do its work (its artifacts were discarded since)?"""
        if state.exit_code is not None or state.signal or self._journal.report(attempt):
            return False
        beat = self._journal.heartbeat(attempt)
        return beat is None or beat.exit_code in (None, EXIT_DONE)

    def _record(
        self, attempt: str, handle: Handle | None, state: JobState, missing: list[str], memory_gb: float
    ) -> None:
        store = self._journal.store
        log = self._journal.log(attempt, self._backend.log(handle) if handle else None)
        report = self._journal.report(attempt) or spoken(log, attempt)
        beat = self._journal.heartbeat(attempt)
        if state.exit_code is None and not state.signal:
            # Nobody saw the process end; its last heartbeat tells how, if it could.
            state = replace(state, phase=ENDED, exit_code=beat.exit_code if beat else None)
        # A node ends with 0 only after it saw its commits, and says so; all words are gone where the whole store is.
        committed = beat is None or beat.exit_code == EXIT_DONE or f"{SPOKEN_END} {attempt}" in log
        verdict = classify(state, report, log, memory_gb, committed=committed)
        if verdict.kind == "lease_lost":
            claims = store.claims.states(missing)
            if not any(claim.attempt == attempt and not claim.released for claim in claims.values()):
                return
            # Nobody took it over: the process could not read its own claim. Without a record it would go on for ever.
            verdict = Verdict("unreachable", "it lost its lease though nobody took it over", HINTS["unreachable"])
        told = str(report.get("stage", "")) if report else ""
        artifact = str(report.get("artifact", "")) if report else ""
        failure = Failure(
            stage=told if told in missing else missing[0],
            attempt=attempt,
            kind=verdict.kind,
            message=verdict.message,
            hint=verdict.hint,
            exit_code=state.exit_code,
            artifact=artifact,
            state=beat.state if beat else "",
            step=beat.step if beat else 0,
            code=code_digest(),
            tail=tail(log),
        )
        if artifact:
            self._heal(artifact)
            self.outdated = True
        self._journal.record_failure(failure, log)
        if self.stopping and verdict.kind in ("preempted", "killed"):
            self._journal.pardon([failure])  # a person stopped it: that uses no budget

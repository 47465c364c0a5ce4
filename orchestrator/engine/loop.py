"""The only part that acts: ticks that bring a grid from what the store holds to what it asks for.

A tick reads (one listing each of artifacts, claims, failures), settles attempts that are over, and submits what is
ready and fits. It keeps nothing that store and scheduler do not know, so it can be killed anywhere and started again on
another machine; two drivers on one grid, or two grids that share stages, meet in the claims.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.backends.base import Backend, Batch, Job
from orchestrator.engine.agenda import Agenda
from orchestrator.engine.driver import Driver
from orchestrator.engine.journal import Journal, code_digest
from orchestrator.engine.mending import Mending
from orchestrator.engine.retry import Decision, decide, pardoned
from orchestrator.engine.waiting import Wait
from orchestrator.engine.watch import InFlight, Watch
from orchestrator.errors import EXIT_UNREACHABLE, MoegridError
from orchestrator.plan.cost import Clock
from orchestrator.plan.describe import describe_job, plugin_files
from orchestrator.plan.following import Following
from orchestrator.plan.graph import StageGraph
from orchestrator.plan.plan import Plan
from orchestrator.spec.cell import Resources
from orchestrator.store import Store
from orchestrator.store.attempts import Failure, PlannedJob, Submission

# How long a driver waits for a store that is away; its jobs go on meanwhile.
PATIENCE_SECONDS = 900.0
FINISH_SECONDS = 60.0
# While nothing happens the pause between ticks grows to this many times `tick_seconds`.
SLOWEST = 4.0
# How often a driver writes what was committed into the store's index, and from how many artifacts on.
INDEX_SECONDS = 60.0
FEWEST_INDEXED = 32
# Finished stages of a shape that times are learnt from, and how much longer than it takes the ranks made of them stand.
SAMPLES = 4
RANKED_FOR = 50.0
CANCEL_FOLDER = "control"


@dataclass(frozen=True, slots=True)
class Options:
    """How a driver works: never what it computes. `max_jobs` 0 = as many as the site takes."""

    site: str = "local"
    site_file: str = ""
    tracking_uri: str = ""
    tick_seconds: float = 0.5
    lease_seconds: float = 30.0
    max_jobs: int = 0
    retry: str = "outside"  # outside | all
    execution: Mapping[str, Any] = field(default_factory=dict)  # replaces fields of the grid's execution
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a tick saw and did."""

    plan: Plan
    busy: Mapping[str, str]  # stage -> attempt
    flying: Mapping[str, InFlight]
    waiting: Mapping[str, Decision]  # stages that will be tried again later
    failures: Mapping[str, Sequence[Failure]]
    finished: tuple[str, ...]  # committed since the last tick
    failed: tuple[Failure, ...]  # written down since the last tick
    submitted: tuple[str, ...]  # labels of the jobs submitted in this tick
    lost: tuple[str, ...] = ()  # discarded: the state whose files they name was made again with other bytes

    @property
    def settled(self) -> bool:
        """Is everything done, or blocked by something that will not be tried again?"""
        return self.plan.settled


class Engine:
    """Drives one grid on one site."""

    def __init__(
        self,
        graph: StageGraph,
        store: Store,
        backend: Backend,
        options: Options | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.graph = graph
        self.store = store
        self.backend = backend
        self.options = options or Options()
        self.journal = Journal(store)
        self.driver = Driver()
        self.mending = Mending(store, graph)
        self.watch = Watch(
            self.journal, backend, self.driver, stall_seconds=self.options.lease_seconds, heal=self.mending.heal
        )
        self.clock = clock or Clock()
        self._stages = frozenset(graph.stages)
        self._following = Following(graph, self.clock)
        self._agenda = Agenda(graph, self.clock)
        self._present: set[str] = set()
        self._told: set[tuple[str, str]] = set()
        self._damaged: set[str] = set()
        self._first = True
        self._stopping = self._leave_jobs = self._stays = False
        self._signalled: set[tuple[str, bool]] = set()
        self._now = False
        self._started = 0.0
        self._indexed = time.monotonic()
        self._news = False  # has the clock learnt what no rank knows of?
        self._ranked = 0.0  # until when stages keep their ranks
        self._earlier: frozenset[tuple[str, str]] = frozenset()  # (stage, attempt) that a driver before us had started

    def begin(self, waits: Mapping[str, frozenset[str]] | None = None) -> None:
        """Pardon what a new run tries again. Failures from before it are old news.

        `waits` are the states that an audit found to wait for files of others (`Audit.waits`).
        """
        self.mending.waits.update(waits or {})
        self._started = self.store.objects.now()
        self._earlier = frozenset((stage, c.attempt) for stage, c in self.journal.claims(self._stages).items())
        self._damaged = self.store.artifacts.damaged(self._stages)
        failures = self.journal.failures(self._stages)
        for own in failures.values():
            self._pardon(own)
        self._told = {(f.stage, f.attempt) for own in failures.values() for f in own}

    def _pardon(self, own: Sequence[Failure]) -> bool:
        """Give a stage that is not tried again a new budget, where a new run does so; return whether it has one."""
        again = not decide(own).retry and all(
            pardoned(failure, retry=self.options.retry, code=code_digest()) for failure in own
        )
        if again:
            self.journal.pardon(own)
        return again

    def extend(self, graph: StageGraph) -> None:
        """Go on with a version of the grid that has more cells."""
        self.graph, self._stages = graph, frozenset(graph.stages)
        self.mending.graph = graph
        self._following = Following(graph, self.clock)
        self._agenda = Agenda(graph, self.clock, self._agenda.backfill)
        self._damaged = self.store.artifacts.damaged(self._stages)

    def tick(self) -> Snapshot:
        """Read, settle, submit. Raises MoegridError (exit code 3) when store or scheduler are away."""
        present = self._keys()
        missing = self._stages - present
        failures = self.journal.failures(missing)
        busy = self.watch.observe(self.journal.claims(missing))
        if self.watch.outdated:  # an artifact was committed meanwhile, or discarded because it is damaged
            present = self._keys()
            missing = self._stages - present
            self._damaged = self.store.artifacts.damaged(missing)
        if self.watch.settled:
            failures = self.journal.failures(missing)
        for stage, own in list(failures.items()):
            # An attempt of an earlier driver whose end is only seen now ended before this run was asked to try again.
            if (stage, own[-1].attempt) in self._earlier and self._pardon(own):
                del failures[stage]
        decisions = {stage: decide(own) for stage, own in failures.items()}
        failed = {stage: decision.reason for stage, decision in decisions.items() if not decision.retry}
        if lost := self.mending.settle(present, self._hopeless):
            present, self._damaged = present - lost, self._damaged | lost
        plan = self._following.update(present, failed, self._damaged)
        now = self.store.objects.now() if decisions else 0.0
        waiting = {stage: decision for stage, decision in decisions.items() if decision.retry and decision.at > now}
        arrived = frozenset() if self._first else present - self._present
        self._learn(arrived)
        submitted: list[str] = []
        if not self._stopping:
            held = self.mending.held
            ready = self._following.ready - busy.keys() - waiting.keys() - held
            submitted = self._submit(ready, present, busy.keys(), {*busy, *waiting, *failed, *held}, decisions)
        news = [f for own in failures.values() for f in own if (f.stage, f.attempt) not in self._told]
        self._told.update((failure.stage, failure.attempt) for failure in news)
        finished = tuple(sorted(arrived, key=self._following.order.__getitem__))
        self._first, self._present = False, present
        flying, told = dict(self.watch.flying), tuple(news)
        return Snapshot(plan, busy, flying, waiting, failures, finished, told, tuple(submitted), tuple(sorted(lost)))

    def _hopeless(self, key: str) -> bool:
        """Return whether the last plan could not make an absent stage."""
        action = self._following.actions.get(key)
        return action is not None and action.name == "blocked"

    def _learn(self, arrived: Collection[str]) -> None:
        """Learn from what was committed how long stages take; rank them anew where nothing was known of a shape."""
        for key in arrived:
            stage, resources = self.graph.stages[key], self.graph.resources(key)
            if self.clock.samples(stage, resources) < SAMPLES and (made := self.store.artifacts.get(key)) is not None:
                self._news |= self.clock.learn(stage, resources, made.info)
        now = time.monotonic()
        if self._news and now > self._ranked:
            self._news = False
            self._agenda.rank()
            self._ranked = time.monotonic() + RANKED_FOR * (time.monotonic() - now)

    def _keys(self) -> set[str]:
        """Return the grid's artifacts."""
        return self.store.artifacts.keys() & self._stages

    def run(self, observe: Callable[[Snapshot], None], trouble: Callable[[MoegridError], None]) -> Snapshot:
        """Tick until everything is done or blocked, or `stop` was called and the jobs have saved their states.

        `trouble` hears of a store or scheduler that is away; raises its error after PATIENCE_SECONDS.
        """
        self._stays, away_since, settled_since = True, 0.0, 0.0
        wait = Wait(self.options.tick_seconds, SLOWEST * self.options.tick_seconds)
        while True:
            pause = took = 0.0
            try:
                began, bell = time.monotonic(), self._bell()
                if self._asked_to_stop() and not self._leave_jobs:
                    self._signal_jobs()
                snapshot = self.tick()
                away_since = 0.0
                observe(snapshot)
                self._index(snapshot)
                took = time.monotonic() - began
                pause = self._until_due(snapshot, wait.next(self._seen(snapshot), took))
                if self._stopping and (self._leave_jobs or not self.watch.mine):
                    return snapshot
                if snapshot.settled:
                    settled_since = settled_since or time.monotonic()
                    if not self.watch.mine or time.monotonic() - settled_since > FINISH_SECONDS:
                        return snapshot
            except MoegridError as error:
                if error.exit_code != EXIT_UNREACHABLE:
                    raise
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > PATIENCE_SECONDS:
                    raise
                trouble(error)
                pause = min(30.0, max(1.0, (time.monotonic() - away_since) / 4))
            self._pause(pause, bell, deaf=3 * took)

    def stop(self, *, now: bool = False, leave_jobs: bool = False) -> None:
        """Submit nothing more, ask the jobs to save their states; `now` ends them, `leave_jobs` lets them go on.

        Safe in a signal handler.
        """
        self._now, self._leave_jobs = self._now or now, leave_jobs
        self._stopping = True
        self.watch.stopping = not leave_jobs

    @property
    def stopped(self) -> bool:
        """Was `stop` called?"""
        return self._stopping

    def _asked_to_stop(self) -> bool:
        if not self._stopping:
            found = self.store.objects.read(f"{CANCEL_FOLDER}/{self.graph.grid.name}.json")
            if found is not None and found.modified > self._started:
                self.stop()
        return self._stopping

    def _seen(self, snapshot: Snapshot) -> object:
        """Return what is equal in two ticks between which nothing happened."""
        happened = snapshot.finished or snapshot.failed or snapshot.submitted or self.watch.settled or self._stopping
        return time.monotonic() if happened else frozenset(snapshot.busy.values())

    def _until_due(self, snapshot: Snapshot, pause: float) -> float:
        """Return `pause`, or less where a stage may be tried again before it is over."""
        if not snapshot.waiting:
            return pause
        due = min(decision.at for decision in snapshot.waiting.values()) - self.store.objects.now()
        return min(pause, max(due, self.options.tick_seconds))

    def _index(self, snapshot: Snapshot) -> None:
        """Bring the store's index of manifests up to date now and then."""
        self.store.index.note(snapshot.finished)
        if time.monotonic() - self._indexed > INDEX_SECONDS:
            self._indexed = time.monotonic()
            self.store.index.save(fewest=FEWEST_INDEXED)

    def _bell(self) -> object:
        """Return what changes when a job ends or commits, where this machine can tell without asking anybody."""
        ended = getattr(self.backend, "ended", None)
        folder = self.store.objects.local_path("artifacts")
        try:
            changed = folder.stat().st_mtime_ns if folder is not None else 0
        except OSError:
            changed = 0
        return changed, ended() if ended is not None else 0

    def _pause(self, seconds: float, bell: object, *, deaf: float) -> None:
        """Sleep, but wake up soon after `stop` was called (by a signal handler, which must not take locks).

        After `deaf` seconds a bell that is another than `bell` wakes up as well.
        """
        began, stopping = time.monotonic(), self._stopping
        while (left := began + seconds - time.monotonic()) > 0 and self._stopping == stopping:
            time.sleep(min(left, 0.1))
            if time.monotonic() - began > deaf and self._bell() != bell:
                return

    def _signal_jobs(self) -> None:
        asked = [handle for handle in self.watch.mine if (handle.attempt, self._now) not in self._signalled]
        self.backend.cancel(asked, now=self._now)
        self._signalled.update((handle.attempt, self._now) for handle in asked)

    def _submit(
        self,
        ready: Collection[str],
        present: set[str],
        at_work: Collection[str],
        taken: set[str],
        decisions: Mapping[str, Decision],
    ) -> list[str]:
        """Claim and submit the most urgent of the ready chains that fit; return their labels."""
        room = self.options.max_jobs - len(self.watch.mine) if self.options.max_jobs else len(ready)
        budget = getattr(self.backend, "budget", None)
        if budget is not None:
            self._agenda.look(budget, lambda: self._following.open, at_work, time.monotonic())
        chosen = self._agenda.choose(
            ready,
            present,
            taken,
            lambda chain: self._resources(chain, decisions),
            self.backend.admit,
            room,
            spread=budget is not None,
        )
        if not chosen:
            return []
        batch = self.driver.new_batch()
        jobs: list[tuple[PlannedJob, Resources]] = []
        for chain, resources in chosen:
            attempt = f"{batch}-{len(jobs)}"
            if won := self._claim(chain, attempt):
                jobs.append((describe_job(self.graph, attempt, won, resources, self.options.execution), resources))
        if jobs:
            self._start(batch, jobs)
        return [job.label for job, _ in jobs]

    def _claim(self, chain: Sequence[str], attempt: str) -> list[str]:
        """Claim the chain from its beginning as far as it is free; what was done or failed meanwhile is given back."""
        leases = self.store.claims.claim_many([(key, attempt) for key in chain], self.options.lease_seconds)
        won: list[str] = []
        for key, lease in zip(chain, leases, strict=True):
            if lease is None:
                break
            if self.store.artifacts.get(key) is not None or not self.journal.knows_failures(key):
                break
            won.append(key)
        for lease in leases[len(won) :]:
            if lease is not None:
                self.store.claims.release(lease)
        return won

    def _start(self, batch: str, jobs: Sequence[tuple[PlannedJob, Resources]]) -> None:
        grid, planned = self.graph.grid, tuple(job for job, _ in jobs)
        self.journal.submit(
            Submission(
                batch,
                planned,
                grid=grid.name,
                grid_digest=grid.digest,
                scale=grid.scale,
                site=self.options.site,
                site_file=self.options.site_file,
                backend=self.backend.name,
                tracking_uri=self.options.tracking_uri,
                plugin_files=plugin_files(planned),
            )
        )
        requests = tuple(Job(job.attempt, index, job.label, asked) for index, (job, asked) in enumerate(jobs))
        try:
            environment, store = self.options.environment, self.store.url
            more = self._stays and len(self._following.open) > sum(len(job.stages) for job in planned)
            handles = self.backend.submit(Batch(batch, store, requests, environment, more))
        except MoegridError:
            # An error is no proof that nothing was started: what the scheduler knows by name goes on.
            handles = self.backend.find(batch)
            self.watch.started(handles.values())
            for job in planned:
                if job.attempt not in handles:
                    for key in job.keys:
                        self.journal.evict(key, job.attempt)
            raise
        self.watch.started(handles.values())
        self.journal.record_handles(handles.values())

    def _resources(self, chain: Sequence[str], decisions: Mapping[str, Decision]) -> Resources:
        resources = self.graph.resources(chain[0])
        factor = max((decisions[key].memory_factor for key in chain if key in decisions), default=1.0)
        return dataclasses.replace(resources, memory_gb=resources.memory_gb * factor)

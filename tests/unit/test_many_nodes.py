"""Two thousand stages on 64 simulated nodes with preemptions, lost nodes, silence and a driver that ends: a sample.

The scheduler is simulated in this process; store, claims, engine and its records are the real ones. The same on the
lab's SLURM and Ray: tests/faults/test_many_slurm.py, test_many_ray.py.
"""

from __future__ import annotations

import collections
import contextlib
import random
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.backends.base import ABSENT, ENDED, QUEUED, RUNNING, Batch, Handle, JobState, SchedulerUnreachable
from orchestrator.engine.loop import Engine, Options, Snapshot
from orchestrator.errors import LeaseLost
from orchestrator.plan.graph import StageGraph
from orchestrator.spec.cell import Resources
from orchestrator.store import Lease, Manifest, Store
from tests.faults import many

NODES = 64


class Cluster:
    """A scheduler of `NODES` nodes: each step a running job commits one of its stages."""

    name = "simulated"

    def __init__(self, store: Store, graph: StageGraph) -> None:
        self.store, self.graph, self.chance = store, graph, random.Random(3)
        self.jobs: dict[str, JobState] = {}
        self.work: dict[str, list[str]] = {}
        self.leases: dict[str, list[Lease]] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        self.began: collections.Counter[str] = collections.Counter()
        self.commits: collections.Counter[str] = collections.Counter()
        self.silent = 0

    def _asked(self, what: str) -> None:
        self.calls[what] += 1
        if self.silent:
            raise SchedulerUnreachable("the controller does not answer")

    def admit(self, wanted: Sequence[Resources]) -> list[bool]:
        free = NODES + NODES // 2 - sum(state.phase in (QUEUED, RUNNING) for state in self.jobs.values())
        return [index < free for index in range(len(wanted))]

    def submit(self, batch: Batch) -> dict[str, Handle]:
        self._asked("submit")
        document = self.store.get_json(f"submissions/{batch.name}.json")
        assert document is not None
        for job, told in zip(batch.jobs, document["jobs"], strict=True):
            self.jobs[job.attempt] = JobState(QUEUED)
            self.work[job.attempt] = [stage["key"] for stage in told["stages"]]
        if self.chance.random() < 0.1:
            raise SchedulerUnreachable("the answer was lost")
        return self.find(batch.name)

    def poll(self, handles: Sequence[Handle]) -> dict[str, JobState]:
        self._asked("poll")
        return {handle.attempt: self.jobs.get(handle.attempt, JobState(ABSENT)) for handle in handles}

    def find(self, batch: str) -> dict[str, Handle]:
        self._asked("find")
        return {a: Handle(a, batch, a) for a in self.jobs if a.rsplit("-", 1)[0] == batch}

    def cancel(self, handles: Sequence[Handle], *, now: bool) -> None:
        self._asked("cancel")

    def forget(self, handles: Sequence[Handle]) -> None:
        self._asked("forget")
        for handle in handles:
            self.jobs.pop(handle.attempt, None)

    def log(self, handle: Handle) -> Path | None:
        return None

    def step(self) -> None:
        """Let a second pass: queued jobs start, running ones commit, some are preempted or lose their node."""
        running = [attempt for attempt, state in self.jobs.items() if state.phase == RUNNING]
        queued = [attempt for attempt, state in self.jobs.items() if state.phase == QUEUED]
        for attempt in queued[: NODES - len(running)]:
            self._enter(attempt)
        for attempt in running:
            fate = self.chance.random()
            if fate < 0.02:  # preempted: it gives its leases back
                for lease in self.leases.pop(attempt):
                    self.store.claims.release(lease)
                self.jobs[attempt] = JobState(ENDED, 75, 0, "PREEMPTED")
            elif fate < 0.03:  # its node is gone, and with it every word
                del self.leases[attempt]
                self.jobs[attempt] = JobState(ENDED, None, 9, "NODE_FAIL")
            else:
                self._commit(attempt)

    def _enter(self, attempt: str) -> None:
        try:
            self.leases[attempt] = [self.store.claims.enter(key, attempt) for key in self.work[attempt]]
        except LeaseLost:
            self.jobs[attempt] = JobState(ENDED, 0)
            return
        self.jobs[attempt] = JobState(RUNNING)
        self.store.put_json(f"attempts/{attempt}/heartbeat.json", {"step": 0, "stage": self.work[attempt][0]})

    def _commit(self, attempt: str) -> None:
        key, lease = self.work[attempt].pop(0), self.leases[attempt].pop(0)
        self.began[key] += 1
        self.store.claims.check(lease)
        assert all(self.store.artifacts.get(parent) for parent in self.graph.stages[key].parents)
        made = Manifest(key=key, kind=self.graph.stages[key].kind, spec={}, attempt=attempt)
        self.commits[key] += self.store.artifacts.commit(made).attempt == attempt
        self.store.claims.release(lease)
        if not self.work[attempt]:
            beat = {"step": 0, "stage": key, "exit_code": 0}
            self.store.put_json(f"attempts/{attempt}/heartbeat.json", beat)
            self.jobs[attempt] = JobState(ENDED, 0)


def test_two_thousand_stages_come_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path))
    # What fails by the site's fault is tried again at once, as often as it takes.
    monkeypatch.setattr("orchestrator.engine.retry.LONGEST_DELAY", 0.0)
    graph = many.graph_of(many.write_grid(tmp_path, 128))
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    cluster = Cluster(store, graph)
    options = Options(lease_seconds=600.0, retry="all")
    engine, restarts = Engine(graph, store, cluster, options), 0
    engine.begin()
    asked: dict[str, set[int]] = {"poll": set(), "submit": set(), "forget": set()}
    settled = 0
    snapshot: Snapshot | None = None
    for tick in range(2000):
        cluster.silent = 3 if tick % 40 == 20 else max(0, cluster.silent - 1)
        before = cluster.calls.copy()
        with contextlib.suppress(SchedulerUnreachable):
            snapshot = engine.tick()
        for name, counts in asked.items():
            counts.add(cluster.calls[name] - before[name])
        settled = max(settled, engine.watch.settled)
        if snapshot is not None and snapshot.settled:
            break
        cluster.step()
        if tick % 60 == 45:  # a driver that is killed, and the next one on the same machine
            engine, restarts = Engine(graph, store, cluster, options), restarts + 1
            engine.begin()
    assert snapshot is not None
    assert snapshot.plan.counts() == {"run": 0, "resume": 0, "done": len(graph.stages), "blocked": 0}
    assert len(graph.stages) > 1900
    assert restarts >= 1
    assert set(cluster.commits) == set(graph.stages)
    assert set(cluster.commits.values()) == {1}, "made twice"
    assert {manifest.generation for manifest in store.artifacts.many(graph.stages).values()} == {0}
    assert max(asked["poll"]) <= 1, "however many jobs there are"
    assert max(asked["submit"]) <= 1
    assert settled > 10
    assert max(asked["forget"]) <= 1, "however many jobs have ended"

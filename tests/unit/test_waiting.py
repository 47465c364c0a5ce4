"""Loops that look again and again: longer pauses while nothing happens, none when a job ends or commits."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.backends.base import ENDED, JobState
from orchestrator.engine.journal import Journal
from orchestrator.engine.loop import Engine, Options, Snapshot
from orchestrator.engine.waiting import Wait
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.report import html
from orchestrator.report.collect import collect
from orchestrator.store import Manifest, Store, index
from orchestrator.store.attempts import Submission
from orchestrator.store.local import LocalObjects
from tests.grid_store import GridStore
from tests.unit.test_engine_loop import Scheduler


@pytest.fixture(scope="module")
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


def test_a_pause_grows_while_nothing_happens_and_begins_anew() -> None:
    wait = Wait(2.0, 10.0)
    assert [wait.next("a", 0.0) for _ in range(6)] == [2.0, 3.0, 4.5, 6.75, 10.0, 10.0]
    assert wait.next("b", 0.0) == 2.0
    assert wait.next("c", 1.0) == pytest.approx(9.0), "a look takes a tenth of the time at most"


class Bell(Scheduler):
    """A scheduler that can tell without being asked how many of its jobs have ended."""

    def ended(self) -> int:
        return sum(state.phase == ENDED for state in self.states.values())


def _jobs(store: Store) -> list[dict[str, Any]]:
    return [job for entry in store.objects.list("submissions") for job in (store.get_json(entry.path) or {})["jobs"]]


@pytest.mark.parametrize("event", ["ends", "commits"])
def test_a_driver_that_waits_wakes_when_a_job(
    event: str, graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path))
    store, scheduler = Store.open(str(tmp_path / "store")), Bell()
    engine = Engine(graph, store, scheduler, Options(tick_seconds=60.0))
    engine.begin()
    ticks: list[float] = []
    busy: dict[str, str] = {}

    def observe(snapshot: Snapshot) -> None:
        ticks.append(time.monotonic())
        busy.update({job["stages"][0]["key"]: job["attempt"] for job in _jobs(store)})
        if len(ticks) == 2:
            engine.stop(leave_jobs=True)

    def happen() -> None:
        stage, attempt = next(iter(busy.items()))
        if event == "ends":
            scheduler.states[attempt] = JobState(ENDED, 1)
        else:
            store.artifacts.commit(Manifest(key=stage, kind=graph.stages[stage].kind, spec={}, attempt=attempt))

    timer = threading.Timer(0.5, happen)
    timer.start()
    engine.run(observe, lambda error: None)
    timer.join()
    assert ticks[1] - ticks[0] < 30, "it slept through"


def test_a_watch_reads_what_is_new_alone(
    graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each further look: nothing where nothing happened, else the manifests, claims and records that are new."""
    monkeypatch.setattr(index, "SETTLED_SECONDS", -1.0)
    monkeypatch.setattr("orchestrator.store.claims._SETTLED_SECONDS", -1.0)
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path))
    store, keys = Store.open(str(tmp_path / "store")), list(graph.stages)
    journal = Journal(store)

    def commit(key: str) -> None:
        store.artifacts.commit(Manifest(key=key, kind=graph.stages[key].kind, spec={}, attempt="b-0-0"))

    for key in keys[: len(keys) // 2]:
        commit(key)
    for key in keys[-6:]:
        store.claims.claim(key, "b-0-0", 0.0)
        store.create_json(f"failures/{key}/b-0-0.json", {"kind": "error", "message": "m"})
    journal.submit(Submission("b-0", (), grid="quickstart", site="local"))
    read: collections.Counter[str] = collections.Counter()
    for name in ("get", "read"):
        real = getattr(LocalObjects, name)

        def counted(self: LocalObjects, path: str, real: object = real) -> object:
            read[path.split("/")[0]] += 1
            return real(self, path)

        monkeypatch.setattr(LocalObjects, name, counted)
    looks: list[dict[str, int]] = []

    def pause(seconds: float) -> None:
        looks.append(dict(read))
        if len(looks) == 2:
            commit(keys[len(keys) // 2])
        if len(looks) == 3:
            store.claims.claim(keys[-1], "c-0-0", 60.0)
        if len(looks) == 4:
            raise KeyboardInterrupt
        read.clear()

    monkeypatch.setattr("orchestrator.commands.status.time.sleep", pause)
    cli.main(["status", "quickstart", "--watch", "--store", store.url])
    capsys.readouterr()
    first, quiet, after_commit, after_claim = looks
    assert first["artifacts"] == len(keys) // 2
    assert quiet == {}, "nothing happened"
    assert after_commit == {"artifacts": 1}
    assert after_claim["claims"] == 1
    assert "artifacts" not in after_claim


def test_a_report_looks_at_the_manifests_a_fixed_number_of_times(tmp_path: Path) -> None:
    """Not once for each of its cells: ten thousand cells would be a hundred million looks."""

    class Counted(dict[str, Manifest]):
        looks = 0

        def items(self) -> Any:
            Counted.looks += 1
            return super().items()

        def values(self) -> Any:
            Counted.looks += 1
            return super().values()

    looks = []
    for seeds in (2, 12):
        store = Store.open(f"memory://{tmp_path.name}-{seeds}")
        grid = GridStore(store, seeds=range(seeds))
        grid.commit_all()
        found = collect("demo", store)
        Counted.looks = 0
        html.page(dataclasses.replace(found, manifests=Counted(found.manifests)))
        looks.append(Counted.looks)
    assert looks[0] == looks[1]

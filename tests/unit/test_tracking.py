"""Publishing: one point a step whatever happens, nothing lost, and a tracker that can be rebuilt from the store."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from orchestrator.errors import MoegridError
from orchestrator.report import attachments, html
from orchestrator.report.collect import collect
from orchestrator.store import Store
from orchestrator.tracking.publish import GridPublisher
from orchestrator.tracking.service import follow, published, sync
from orchestrator.tracking.tracker import (
    FAILED,
    FINISHED,
    KEY_TAG,
    RUNNING,
    Point,
    Recorded,
    Run,
    TrackerAway,
    four_digits,
)
from tests.grid_store import FINETUNE_STEPS, LOG_EVERY, GridStore

URI = "fake://tracker"


class FakeTracker:
    """A tracker that keeps every point for ever, as MLflow does, and can go away in the middle of a batch."""

    def __init__(self) -> None:
        self.runs: dict[str, Recorded] = {}
        self.names: dict[str, str] = {}
        self.parents: dict[str, str] = {}
        self.points: dict[str, list[Point]] = {}
        self.columns: list[tuple[str, str]] = []
        self.files: dict[str, list[dict[str, str]]] = {}
        self.fail_after: int | None = None

    def _pass(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise TrackerAway("away", cause="the test says so")

    def open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Sequence[tuple[str, str]]
    ) -> dict[str, Recorded]:
        self._pass()
        self.columns = list(columns)
        copies = {}
        for key, run in self.runs.items():
            last: dict[str, int] = {}
            for point in self.points[run.id]:
                last[point.metric] = max(point.step, last.get(point.metric, -1))
            copies[key] = Recorded(run.id, dict(run.tags), set(run.params), last, run.status)
        return copies

    def create(self, run: Run, parent: str) -> Recorded:
        self._pass()
        assert run.key not in self.runs
        self.runs[run.key] = Recorded(f"id{len(self.runs)}", {KEY_TAG: run.key}, set(), {}, RUNNING)
        self.names[run.key], self.parents[run.key] = run.name, parent
        self.points[self.runs[run.key].id] = []
        return Recorded(self.runs[run.key].id, {KEY_TAG: run.key}, set(), {}, RUNNING)

    def write(
        self, recorded: Recorded, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        own = self._own(recorded)
        for name in params:
            self._pass()
            own.params.add(name)
        for point in points:
            self._pass()
            self.points[recorded.id].append(point)
        self._pass()
        own.tags.update(tags)
        recorded.params.update(params)
        recorded.tags.update(tags)
        for point in points:
            recorded.last[point.metric] = max(point.step, recorded.last.get(point.metric, -1))

    def remove(self, recorded: Recorded, tags: Iterable[str]) -> None:
        self._pass()
        for name in tags:
            recorded.tags.pop(name, None)
            self._own(recorded).tags.pop(name, None)

    def steps(self, recorded: Recorded, metric: str) -> set[int]:
        self._pass()
        return {p.step for p in self.points[recorded.id] if p.metric == metric}

    def attach(self, recorded: Recorded, folder: Path) -> None:
        self._pass()
        files = {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}
        self.files.setdefault(recorded.id, []).append(files)

    def finish(self, recorded: Recorded, status: str, ended: float) -> None:
        self._pass()
        recorded.status = self._own(recorded).status = status

    def _own(self, recorded: Recorded) -> Recorded:
        return next(run for run in self.runs.values() if run.id == recorded.id)

    def content(self) -> dict[str, object]:
        return {
            key: (
                self.names[key],
                sorted((p.metric, p.step, p.value) for p in self.points[run.id]),
                run.status,
                run.params,
                {name: text for name, text in run.tags.items() if name != "mlflow.parentRunId"},
            )
            for key, run in self.runs.items()
        }

    def assert_one_point_a_step(self) -> None:
        for points in self.points.values():
            steps = [(p.metric, p.step) for p in points]
            assert len(steps) == len(set(steps))


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_a_cell_is_a_run_and_a_shared_stage_has_one_of_its_own(store: Store) -> None:
    grid = GridStore(store)
    grid.commit_all()
    tracker = FakeTracker()
    summary = sync(store, "demo", URI, tracker=tracker)[0]
    assert summary.complete
    cells = [key for key in tracker.runs if "/cell/" in key]
    assert len(cells) == 12
    assert len(tracker.runs) == 12 + len(grid.stages)
    base = tracker.runs[f"demo/stage/{grid.base}"]
    assert tracker.parents[f"demo/stage/{grid.base}"] == ""
    assert len(base.tags["cells"].split()) == 12
    cell = grid.cell("router", 1)
    run = tracker.runs[f"demo/cell/{cell['id']}"]
    assert tracker.names[f"demo/cell/{cell['id']}"] == "freeze=router seed=1"
    assert grid.base[:12] in run.tags["shared"]
    assert tracker.parents[f"demo/stage/{cell['final']}"] == run.id
    assert run.status == FINISHED
    losses = [p.step for p in tracker.points[run.id] if p.metric == "train/loss"]
    assert losses == list(range(LOG_EVERY, FINETUNE_STEPS + 1, LOG_EVERY))  # the last phase, stitched from two halves
    evaluated = {(p.metric, p.step) for p in tracker.points[run.id] if p.metric.startswith("eval/")}
    assert ("eval/answer_bpb", 10) in evaluated
    assert ("eval/answer_bpb", 20) in evaluated
    tracker.assert_one_point_a_step()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.21450880, 1.2145),
        (25.123456, 25.1235),
        (0.1, 0.1),
        (0.00123456, 0.001235),
        (-3.21987e-7, -3.22e-7),
        (0.0, 0.0),
    ],
)
def test_a_tracker_shows_four_digits_of_a_result(value: float, shown: float) -> None:
    assert four_digits(value) == shown


def test_results_are_shown_as_tables_show_them_and_stay_whole_in_the_store(store: Store) -> None:
    grid, tracker = GridStore(store), FakeTracker()
    grid.commit_all()
    sync(store, "demo", URI, tracker=tracker)
    cell = grid.cell("router", 1)
    run = tracker.runs[f"demo/cell/{cell['id']}"]
    shown = {(p.metric, p.step): p.value for p in tracker.points[run.id]}
    keys = [result["key"] for result in cell["results"] if (result["suite"], result["at"]) == ("lm", 1.0)]
    (whole,) = (manifest.metrics["val_loss"] for manifest in store.artifacts.many(keys).values())
    assert whole != round(whole, 4)
    assert shown["eval/val_loss", FINETUNE_STEPS] == round(whole, 4)


def test_a_second_sync_adds_nothing_and_a_rebuilt_tracker_is_equal(store: Store) -> None:
    GridStore(store).commit_all()
    tracker, rebuilt = FakeTracker(), FakeTracker()
    sync(store, "demo", URI, tracker=tracker)
    again = sync(store, "demo", URI, tracker=tracker)[0]
    assert (again.created, again.points) == (0, 0)
    sync(store, "demo", URI, tracker=rebuilt)
    assert rebuilt.content() == tracker.content()


@pytest.mark.parametrize("fail_after", [0, 1, 5, 9, 30, 77, 120])
def test_a_tracker_that_goes_away_anywhere_loses_and_doubles_nothing(store: Store, fail_after: int) -> None:
    GridStore(store, settings=("none", "router"), seeds=(0,)).commit_all()
    whole, tracker = FakeTracker(), FakeTracker()
    sync(store, "demo", URI, tracker=whole)
    publisher = GridPublisher(store, tracker, "demo")
    tracker.fail_after = fail_after
    with pytest.raises(TrackerAway):
        publisher.tick()
    tracker.fail_after = None
    publisher.tick()
    assert tracker.content() == whole.content()
    tracker.assert_one_point_a_step()


def test_a_live_series_survives_a_kill_and_a_resume_with_one_point_a_step(store: Store) -> None:
    grid = GridStore(store, settings=("none",), seeds=(0,))
    cell = grid.cell("none", 0)
    half = cell["stages"][1]
    rows = grid.rows(half)
    tracker = FakeTracker()
    publisher = GridPublisher(store, tracker, "demo")
    first = grid.submit("one", [half])
    assert store.claims.claim(half, first, 60) is not None
    grid.tell(first, 0, half, rows[:1])
    publisher.tick(following=True)
    run = tracker.runs[f"demo/cell/{cell['id']}"]
    assert run.status == RUNNING
    assert len(tracker.points[run.id]) == 2
    grid.tell(first, 1, half, rows[1:])
    publisher.tick(following=True)
    # Killed, and resumed from an earlier checkpoint: the same steps are told again, later.
    second = grid.submit("two", [half])
    grid.tell(second, 0, half, [{**row, "time": row["time"] + 99} for row in rows])
    publisher.tick(following=True)
    GridPublisher(store, tracker, "demo").tick(following=True)
    grid.commit_all()
    publisher.tick()
    tracker.assert_one_point_a_step()
    rebuilt = FakeTracker()
    sync(store, "demo", URI, tracker=rebuilt)
    assert rebuilt.content() == tracker.content()


def test_a_gap_that_the_live_view_left_is_filled_when_the_state_is_committed(store: Store) -> None:
    grid = GridStore(store, settings=("none",), seeds=(0,))
    half = grid.cell("none", 0)["stages"][1]
    attempt = grid.submit("one", [half])
    store.claims.claim(half, attempt, 60)
    grid.tell(attempt, 0, half, grid.rows(half)[1:])  # the first row never arrived
    tracker, whole = FakeTracker(), FakeTracker()
    GridPublisher(store, tracker, "demo").tick(following=True)
    grid.commit_all()
    sync(store, "demo", URI, tracker=tracker)
    sync(store, "demo", URI, tracker=whole)
    assert tracker.content() == whole.content()


def test_a_failed_stage_is_told_and_forgotten_once_it_works(store: Store) -> None:
    grid = GridStore(store, settings=("none",), seeds=(0,))
    cell = grid.cell("none", 0)
    grid.commit(grid.base)
    attempt = grid.submit("one", cell["stages"][1:3])
    grid.fail(attempt, cell["stages"][1])
    tracker = FakeTracker()
    sync(store, "demo", URI, tracker=tracker)
    run = tracker.runs[f"demo/cell/{cell['id']}"]
    assert run.status == FAILED
    assert run.tags["failure"] == "nan"
    grid.commit_all(cell["stages"][1:])
    sync(store, "demo", URI, tracker=tracker)
    assert run.status == FINISHED
    assert "failure" not in run.tags


def test_the_marker_says_when_everything_is_published(store: Store) -> None:
    grid = GridStore(store, settings=("none",), seeds=(0,))
    stages = list(grid.stages)
    grid.commit_all(stages[:-1])
    assert not published(store, "demo", URI)
    sync(store, "demo", URI, tracker=FakeTracker())
    assert published(store, "demo", URI)
    grid.commit(stages[-1])
    assert not published(store, "demo", URI)
    assert not published(store, "demo", "sqlite:////nowhere/mlflow.db")


def test_follow_goes_on_while_the_tracker_is_away_and_ends_complete(store: Store) -> None:
    GridStore(store, settings=("none",), seeds=(0,)).commit_all()
    tracker, whole = FakeTracker(), FakeTracker()
    stop = threading.Event()
    away = itertools.count()

    def connect() -> FakeTracker:
        if next(away) < 2:
            raise TrackerAway("away", cause="not yet")
        stop.set()
        return tracker

    assert follow(store, ["demo"], URI, stop=stop, interval=0.01, tracker=connect)
    sync(store, "demo", "fake://other", tracker=whole)
    assert tracker.content() == whole.content()


def test_one_publisher_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    GridStore(store, settings=("none",), seeds=(0,)).commit_all()
    monkeypatch.setattr("orchestrator.tracking.service.LEASE_SECONDS", -5.0)
    sync(store, "demo", URI, tracker=FakeTracker())
    name = next(name for name in store.claims.states() if name.startswith("tracker-"))
    assert store.claims.claim(name, "another", 60) is not None
    with pytest.raises(MoegridError, match="another process is publishing"):
        sync(store, "demo", URI, tracker=FakeTracker())


def test_finished_cells_of_an_earlier_version_stay_and_say_so(store: Store) -> None:
    old = GridStore(store, settings=("none", "router"), seeds=(0,))
    old.commit_all()
    GridStore(store, settings=("none",), seeds=(0,))
    tracker = FakeTracker()
    sync(store, "demo", URI, tracker=tracker)
    names = {key: tracker.names[key] for key in tracker.runs if "/cell/" in key}
    assert names == {
        f"demo/cell/{old.cell('none', 0)['id']}": "freeze=none seed=0",
        f"demo/cell/{old.cell('router', 0)['id']}": "freeze=router seed=0 (earlier version)",
    }


def test_figures_are_attached_once_to_cells_and_to_a_run_of_the_report(store: Store, tmp_path: Path) -> None:
    grid = GridStore(store, settings=("none", "router"), seeds=(0,))
    grid.commit_all()
    tracker = FakeTracker()

    def files(name: str) -> Path:
        results = collect(name, store)
        return attachments.write(results, html.write(results, tmp_path / "page" / "index.html"), tmp_path / "runs")

    sync(store, "demo", URI, tracker=tracker, files=files)
    sync(store, "demo", URI, tracker=tracker, files=files)
    assert set(tracker.runs) >= {"demo/report"}
    (report,) = tracker.files[tracker.runs["demo/report"].id]
    assert {"index.html", "table.csv", "table.tex", "cells.csv"} <= set(report)
    note = tracker.runs["demo/report"].tags["mlflow.note.content"]
    assert note == report["note.md"]
    assert "**answer_bpb**" not in note, "names are written out"
    assert "is not resolved from none on answer_bpb" in note
    assert "| router |" in note, "the table of primary metrics"
    assert "<" not in note.replace("<b>& more</b>", "")
    assert any(name.startswith("figures/training/") for name in report)
    (own,) = tracker.files[tracker.runs[f"demo/cell/{grid.cell('router', 0)['id']}"].id]
    assert "figures/train_loss_by_step.svg" in own
    assert "frozen" not in own["figures/train_loss_by_step.svg"]  # the schedule of this cell does not change
    assert ("params", "freeze") in tracker.columns
    assert ("metrics", "eval/answer_bpb") in tracker.columns


def test_an_unknown_grid_names_the_known_ones(store: Store) -> None:
    GridStore(store)
    with pytest.raises(MoegridError) as caught:
        sync(store, "dmo", URI, tracker=FakeTracker())
    assert "demo" in str(caught.value)

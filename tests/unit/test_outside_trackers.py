"""A tracker of another package: named by its scheme or its name, it shows what MLflow would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.catalog.trackers import full_uri, tracker_of
from orchestrator.errors import MoegridError
from orchestrator.settings import tracking_uri
from orchestrator.store import Store
from orchestrator.tracking.service import connect, published, sync
from tests.grid_store import GridStore
from tests.packages import found, install

WALL = '''
import json
from pathlib import Path

from orchestrator.catalog.trackers import TrackerKind
from orchestrator.tracking.tracker import KEY_TAG, Recorded


class Wall:
    """One JSON file a run."""

    def __init__(self, uri):
        self.folder = Path(uri.removeprefix("wall://") or "wall")
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, experiment, description, tags, columns):
        found = {}
        for path in self.folder.glob("*.json"):
            run = json.loads(path.read_text())
            last = {metric: max(map(int, steps)) for metric, steps in run["points"].items()}
            found[run["key"]] = Recorded(path.stem, run["tags"], set(run["params"]), last, run["status"])
        return found

    def create(self, run, parent):
        made = f"{len(list(self.folder.iterdir()))}"
        tags = {KEY_TAG: run.key}
        new = {"key": run.key, "tags": tags, "params": {}, "points": {}, "status": run.status}
        (self.folder / f"{made}.json").write_text(json.dumps(new))
        return Recorded(made, dict(tags), set(), {}, run.status)

    def change(self, recorded, change):
        path = self.folder / f"{recorded.id}.json"
        run = json.loads(path.read_text())
        change(run)
        path.write_text(json.dumps(run))

    def write(self, recorded, points, params, tags):
        def change(run):
            for point in points:
                run["points"].setdefault(point.metric, {})[str(point.step)] = point.value
            run["params"].update(params)
            run["tags"].update(tags)

        self.change(recorded, change)

    def remove(self, recorded, tags):
        self.change(recorded, lambda run: [run["tags"].pop(tag, None) for tag in tags])

    def steps(self, recorded, metric):
        run = json.loads((self.folder / f"{recorded.id}.json").read_text())
        return set(map(int, run["points"].get(metric, {})))

    def attach(self, recorded, folder):
        pass

    def finish(self, recorded, status, ended):
        self.change(recorded, lambda run: run.update(status=status))


WALL = TrackerKind("wall", "walls:Wall")
NEEDY = TrackerKind("needy", "walls:Wall", needs="no_such_module")
'''


@pytest.fixture(autouse=True)
def walls(tmp_path: Path) -> Iterator[Path]:
    install(tmp_path / "site", "walls", WALL, {"trackers": {"wall": "walls:WALL", "needy": "walls:NEEDY"}})
    with found(tmp_path / "site", "walls") as folder:
        yield folder


def test_it_shows_every_run_and_point_once(tmp_path: Path) -> None:
    grid = GridStore(Store.open(str(tmp_path / "store")), settings=("none",), seeds=(0,))
    grid.commit_all()
    uri = f"wall://{tmp_path}/wall"
    (first,) = sync(grid.store, grid.name, uri)
    runs = [json.loads(path.read_text()) for path in (tmp_path / "wall").glob("*.json")]
    assert first.created == len(runs) > 0
    assert {run["status"] for run in runs} == {"FINISHED"}
    assert first.points == sum(len(steps) for run in runs for steps in run["points"].values()) > 0
    assert published(grid.store, grid.name, uri)
    (second,) = sync(grid.store, grid.name, uri)
    assert second.points == 0
    assert len(list((tmp_path / "wall").glob("*.json"))) == len(runs)


def test_its_name_alone_is_its_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("wall", "runs") == "wall://"
    assert tracker_of("wall://x/y").name == "wall"
    assert type(connect("wall://")).__name__ == "Wall"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("wal://x", r"tracker 'wal' is unknown.*did you mean 'wall'"),
        ("wal", r"tracker 'wal' is unknown.*did you mean 'wall'.*folder"),
        ("needy://x", r"no_such_module is not installed.*pip install 'no_such_module'"),
    ],
)
def test_a_tracker_that_is_not_there_is_told_before_anything_runs(
    tmp_path: Path, given: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoegridError) as caught:
        tracking_uri(given, "runs")
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///a.db", "http://host:1", "https://host", "postgresql+psycopg2://u@h/d", "./runs", "a/b", "databricks"],
)
def test_what_is_mlflows_looks_at_no_package(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: pytest.fail("it scanned"))
    assert tracker_of(full_uri(uri)).name == "mlflow"

"""TensorBoard and wandb show every run and point once; wandb by its documented interface, and itself where it is."""

from __future__ import annotations

import errno
import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from orchestrator.catalog.trackers import tracker_of
from orchestrator.errors import MoegridError
from orchestrator.settings import tracking_uri
from orchestrator.store import Store
from orchestrator.tracking.service import published, sync
from orchestrator.tracking.tracker import TrackerAway
from orchestrator.tracking.wandb import WandbTracker
from tests.grid_store import GridStore


def grid_store(folder: Path) -> GridStore:
    grid = GridStore(Store.open(str(folder / "store")), settings=("none",), seeds=(0,))
    grid.commit_all()
    return grid


def scalars(folder: Path) -> list[tuple[str, str, int, float]]:
    """Read event files by their format: length, its checksum, the event, its checksum."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in folder.rglob("events.out.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                if value.WhichOneof("value") == "simple_value":
                    found.append((path.parent.name, value.tag, event.step, value.simple_value))
    return found


def test_tensorboard_has_every_point_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    grid = grid_store(tmp_path)
    uri = f"tensorboard://{tmp_path}/tb"
    (first,) = sync(grid.store, grid.name, uri)
    shown = scalars(tmp_path / "tb")
    assert first.points == len(shown) > 0
    assert len({point[:3] for point in shown}) == len(shown)
    assert len(list((tmp_path / "tb" / grid.name).glob("*.run.json"))) == first.created > 0
    assert published(grid.store, grid.name, uri)
    (second,) = sync(grid.store, grid.name, uri)
    assert (second.points, len(scalars(tmp_path / "tb"))) == (0, len(shown))


def test_a_note_that_cannot_be_written_is_a_tracker_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    grid = grid_store(tmp_path)

    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TrackerAway, match="the tracker's folder"):
        sync(grid.store, grid.name, f"tensorboard://{tmp_path}/tb")


class FakeRun:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.logged, self.axes, self.ended = settings, [], [], []  # type: ignore[var-annotated]
        self.config = self
        self.values: dict[str, Any] = {}

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        assert allow_val_change
        self.values |= values

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeRun]:
    """wandb as its reference describes `init`, `Settings` and a run."""
    made: list[FakeRun] = []
    module: Any = types.ModuleType("wandb")

    def init(**settings: Any) -> FakeRun:
        made.append(FakeRun(settings))
        return made[-1]

    module.init, module.Settings = init, lambda **values: values
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "here"))
    return made


def test_wandb_gets_every_run_and_point_once(tmp_path: Path, runs: list[FakeRun]) -> None:
    grid = grid_store(tmp_path)
    (first,) = sync(grid.store, grid.name, "wandb://team/moe")
    assert {(run.settings["entity"], run.settings["project"], run.settings["group"]) for run in runs} == {
        ("team", "moe", grid.name)
    }
    assert len({run.settings["id"] for run in runs}) == first.created == len(runs)
    logged = [(run.settings["id"], row["step"], name) for run in runs for row in run.logged for name in row]
    points = [one for one in logged if one[2] != "step"]
    assert len(points) == len(set(points)) == first.points
    assert all(run.axes == [("*", "step")] and run.ended == [0] and run.values for run in runs)
    (second,) = sync(grid.store, grid.name, "wandb://team/moe")
    assert (second.points, second.created) == (0, 0)


def logged_offline(path: Path) -> list[tuple[float, str]]:
    """Read the file of an offline run by its format: blocks of pieces of records, as LevelDB's log has them."""
    from wandb.proto import wandb_internal_pb2

    found, data, at, whole = list[tuple[float, str]](), path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + size], at + 7 + size
        if kind not in (1, 4):  # more of it follows
            continue
        items = wandb_internal_pb2.Record.FromString(whole).history.item
        values = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in items}
        found += [(values["step"], name) for name in values if name != "step" and not name.startswith("_")]
        whole = b""
    return found


def test_wandb_offline_keeps_every_point_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    grid = grid_store(tmp_path)
    try:
        (first,) = sync(grid.store, grid.name, "wandb://team/moe")
        (second,) = sync(grid.store, grid.name, "wandb://team/moe")
    finally:
        wandb.teardown()
    assert (second.points, second.created) == (0, 0)
    files = sorted((tmp_path / "here").rglob("*.wandb"))
    assert len(files) == first.created
    points = [(path.name, *point) for path in files for point in logged_offline(path)]
    assert len(points) == len(set(points)) == first.points


def test_what_refuses_is_a_tracker_that_is_away(tmp_path: Path, runs: list[FakeRun]) -> None:
    def refuse(**settings: object) -> None:
        raise ValueError("no key")

    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    grid = grid_store(tmp_path)
    tracker = WandbTracker("wandb://moe")
    tracker.open(grid.name, "", {}, ())
    with pytest.raises(TrackerAway, match="wandb refuses") as caught:
        tracker.describe({"id": "a", "name": "n", "params": {}, "tags": {}})
    assert "no key" in caught.value.cause


def test_its_package_that_is_not_there_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.settings.installed", lambda module: False)
    for uri, needs in (("tensorboard://x", "tensorboardX"), ("wandb", "wandb")):
        with pytest.raises(MoegridError, match=f"{needs} is not installed"):
            tracking_uri(uri, "runs")
    assert tracker_of("tensorboard://runs/tb").needs == "tensorboardX"

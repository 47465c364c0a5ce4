"""Trackers that cannot be asked what they hold: beside what they show lies a note of it, one JSON file a run.

A tracker compares what it holds with the store. TensorBoard's event files and wandb's offline runs are only added to,
so that the note says what was written; it is replaced after each batch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.tracking.tracker import KEY_TAG, RUNNING, Point, Recorded, Run, TrackerAway

Note = dict[str, Any]


class NotedTracker(ABC):
    """The tracker's protocol over notes in `folder`; a kind shows what is new in `show`, `describe` and `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.experiment = ""
        self._notes: dict[str, Note] = {}

    @abstractmethod
    def show(self, note: Note, points: Sequence[Point]) -> None:
        """Show new points of a run."""

    @abstractmethod
    def describe(self, note: Note) -> None:
        """Show a run's params and tags, which have changed."""

    def close(self, note: Note) -> None:  # noqa: B027 (as a rule nothing is to be shown)
        """Show a run's status, which has changed."""

    def open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Sequence[tuple[str, str]]
    ) -> dict[str, Recorded]:
        """Return what is noted of an experiment's runs, by key."""
        self.experiment = experiment
        try:
            (self.folder / experiment).mkdir(parents=True, exist_ok=True)
            found = [json.loads(path.read_text()) for path in (self.folder / experiment).glob("*.run.json")]
        except (OSError, ValueError) as error:
            raise TrackerAway(f"the tracker's folder {self.folder} cannot be used", cause=str(error)) from error
        self._notes = {note["id"]: note for note in found}
        return {note["key"]: self._recorded(note) for note in found}

    def create(self, run: Run, parent: str) -> Recorded:
        """Note a new run with its params."""
        made = hashlib.sha256(f"{self.experiment}/{run.key}".encode()).hexdigest()[:16]
        note: Note = {"id": made, "key": run.key, "name": run.name, "parent": parent, "status": RUNNING}
        note |= {"params": dict(run.params), "tags": {KEY_TAG: run.key}, "steps": {}}
        self._notes[made] = note
        self.describe(note)
        self._keep(note)
        return self._recorded(note)

    def write(
        self, recorded: Recorded, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Show points, params and tags, then note them."""
        note = self._notes[recorded.id]
        if points:
            self.show(note, sorted(points, key=lambda point: (point.step, point.metric)))
        for point in points:
            note["steps"].setdefault(point.metric, []).append(point.step)
            recorded.last[point.metric] = max(point.step, recorded.last.get(point.metric, -1))
        note["params"].update(params)
        note["tags"].update(tags)
        recorded.params.update(params)
        recorded.tags.update(tags)
        if params or tags:
            self.describe(note)
        self._keep(note)

    def remove(self, recorded: Recorded, tags: Iterable[str]) -> None:
        """Remove tags."""
        note = self._notes[recorded.id]
        for tag in tags:
            note["tags"].pop(tag, None)
            recorded.tags.pop(tag, None)
        self._keep(note)

    def steps(self, recorded: Recorded, metric: str) -> set[int]:
        """Return the noted steps of one metric."""
        return set(self._notes[recorded.id]["steps"].get(metric, ()))

    def attach(self, recorded: Recorded, folder: Path) -> None:  # noqa: B027
        """Keep files with a run: not here, the report is beside."""

    def finish(self, recorded: Recorded, status: str, ended: float) -> None:
        """Set the run's status."""
        note = self._notes[recorded.id]
        note["status"] = recorded.status = status
        self.close(note)
        self._keep(note)

    @staticmethod
    def _recorded(note: Note) -> Recorded:
        last = {metric: max(steps) for metric, steps in note["steps"].items()}
        return Recorded(note["id"], dict(note["tags"]), set(note["params"]), last, note["status"])

    def _keep(self, note: Note) -> None:
        path = self.folder / self.experiment / f"{note['id']}.run.json"
        part = path.with_suffix(".part")

        def write() -> None:
            part.write_text(json.dumps(note))
            part.replace(path)

        reached(write, f"the tracker's folder {self.folder}")


def folder_of(uri: str, scheme: str) -> Path:
    """Return the folder of `SCHEME://FOLDER`, by default one of the scheme's name here."""
    return Path(uri.removeprefix(f"{scheme}://") or scheme).expanduser()


def reached(call: Callable[[], object], what: str) -> None:
    """Do `call`; TrackerAway with what went wrong in another project's code, or on a disk."""
    try:
        call()
    except Exception as error:  # whatever it raises, training goes on and a later sync fills it in
        raise TrackerAway(f"{what} refuses", cause=f"{type(error).__name__}: {error}") from error

"""Projects the store into a tracker: live while a grid runs, complete from the store alone at any time.

The store is the truth and the tracker a copy: whatever is deleted there comes back. A publisher logs only what the
tracker does not hold yet, so that every series has exactly one point per step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.spec.identity import digest
from orchestrator.store import Store, records
from orchestrator.store.manifest import Manifest
from orchestrator.tracking.tracker import (
    FINISHED,
    KILLED,
    RUNNING,
    SCHEDULED,
    Point,
    Recorded,
    Run,
    Tracker,
    points_of,
    project,
    safe_name,
)

PUBLISHED_TAG = "moegrid.published"
ATTACHED_TAG = "moegrid.attached"
NOTE_TAG = "mlflow.note.content"
NOTE_FILE = "note.md"  # of a run's files the one that is its note too
REPORT = "report"
USUAL_METRICS = ("val_loss", "reasoning_avg", "load_balance")
OPTIONAL_TAGS = frozenset({"failure", "failure.message", "mlflow.parentRunId", "cell", "cells", "shared", "plugins"})


@dataclass(slots=True)
class Published:
    """What a sync did."""

    experiment: str = ""
    runs: int = 0
    created: int = 0
    points: int = 0
    complete: bool = False  # everything the store holds is shown


@dataclass(slots=True)
class _Progress:
    """One run as the tracker holds it, and what this publisher checked of it."""

    recorded: Recorded
    shown: str = ""
    began_empty: bool = False
    sent: set[str] = field(default_factory=set)


class GridPublisher:
    """Publishes one grid. `tick` brings the tracker up to date; call it again and again while the grid runs."""

    def __init__(self, store: Store, tracker: Tracker, grid: str) -> None:
        self._store, self._tracker, self._grid = store, tracker, grid
        self._submissions = records.Submissions(store, grid)
        self._live = records.LiveSeries(store)
        self._documents: list[dict[str, Any]] = []
        self._read: list[tuple[str, float]] = []
        self._keys: set[str] = set()
        self._state: object = None
        self._summary = Published(grid)
        self._manifests: dict[str, Manifest] = {}
        self._progress: dict[str, _Progress] | None = None
        self.damaged: dict[str, str] = {}  # artifacts whose series could not be shown, with the cause

    def tick(self, *, following: bool = False) -> Published:
        """Bring the tracker up to date; after TrackerAway or StoreError the next tick starts from what is there."""
        try:
            return self._tick(following)
        except BaseException:
            self._progress = self._state = None  # what arrived is unknown: ask the tracker again
            raise

    def _tick(self, following: bool) -> Published:
        documents = self._read_documents()
        if not documents:
            return Published(self._grid, complete=True)
        present = self._store.artifacts.keys() & self._keys
        known = {key: manifest for key, manifest in self._manifests.items() if key in present}
        self._manifests = known | self._store.artifacts.many(present - known.keys())
        waiting = self._keys - self._manifests.keys()
        attempts = self._submissions.attempts()
        failed = records.failures(self._store, waiting) if waiting else {}
        told = self._live.refresh(attempts, self._manifests)
        tried = {stage for attempt in attempts for stage in attempt.stages} & waiting
        live = {stage for stage, state in self._store.claims.states(sorted(tried)).items() if state.live}
        state = (self._read, present, failed, told, live, following)
        if state == self._state:
            return self._summary
        runs = project(documents, self._manifests, attempts, failed, live=live)
        if self._progress is None:
            newest = documents[-1]
            tags = {"scale": newest["scale"]}
            held = self._tracker.open(self._grid, _description(newest), tags, _columns(newest))
            self._progress = {key: _Progress(r, shown=r.tags.get(PUBLISHED_TAG, "")) for key, r in held.items()}
        summary = Published(self._grid, runs=len(runs), complete=True)
        for run in runs:
            self._publish(run, following, summary)
        self._state, self._summary = state, Published(self._grid, runs=len(runs), complete=True)
        return summary

    def _read_documents(self) -> list[dict[str, Any]]:
        """Return the grid's versions, read again only when one was added."""
        entries = records.versions(self._store, self._grid)
        if entries != self._read:
            self._documents, self._read = records.documents(self._store, self._grid), entries
            self._keys = {key for document in self._documents for key in document["keys"]}
        return self._documents

    def _publish(self, run: Run, following: bool, summary: Published) -> None:
        assert self._progress is not None
        status = RUNNING if following and run.status in (SCHEDULED, KILLED) else run.status
        progress = self._progress.get(run.key)
        parent = self._progress.get(run.parent)
        if progress is None:
            recorded = self._tracker.create(run, parent.recorded.id if parent else "")
            progress = self._progress[run.key] = _Progress(recorded, began_empty=True)
            summary.created += 1
        held = progress.recorded
        signature = run.signature() if run.settled else ""
        if not signature or progress.shown != signature:
            self._write(run, progress, parent.recorded.id if parent else "", signature, summary)
        if held.status != status:
            self._tracker.finish(held, status, run.ended)

    def _write(self, run: Run, progress: _Progress, parent: str, signature: str, summary: Published) -> None:
        held = progress.recorded
        points = self._points(run, progress)
        params = {name: text for name, text in run.params.items() if name not in held.params}
        wanted = {**run.tags, "mlflow.runName": run.name}
        if parent:
            wanted["mlflow.parentRunId"] = parent
        removed = sorted((OPTIONAL_TAGS & held.tags.keys()) - wanted.keys())
        tags = {name: text for name, text in wanted.items() if held.tags.get(name) != text}
        if removed:
            self._tracker.remove(held, removed)
        if signature:
            tags[PUBLISHED_TAG] = signature
        if points or params or tags:
            self._tracker.write(held, points, params, tags)
        summary.points += len(points)
        progress.shown = signature

    def _points(self, run: Run, progress: _Progress) -> list[Point]:
        """Return what the tracker lacks: points above the last recorded step, and gaps once everything is committed."""
        series: list[records.Row] = []
        committed = records.committed_rows(
            self._store,
            [self._manifests[k] for k in run.series if k in self._manifests and k not in progress.sent],
            self.damaged,
        )
        for key in run.series:
            series.extend(committed.get(key, ()) if key in self._manifests else self._live.rows(key))
        candidates = [*points_of(records.ordered(series)), *run.results]
        last = progress.recorded.last
        points = [p for p in candidates if p.step > last.get(p.metric, -1)]
        if run.settled and not progress.began_empty:
            # A tracker that was away, or another publisher, may have left gaps below the last step.
            below = {p.metric for p in candidates if p.step <= last.get(p.metric, -1)}
            for metric in sorted(below):
                there = self._tracker.steps(progress.recorded, metric)
                mine = [p for p in candidates if p.metric == metric and p.step <= last[metric]]
                points.extend(p for p in mine if p.step not in there)
        if not run.settled or progress.began_empty:
            progress.sent.update(committed)
        return sorted(points, key=lambda p: (p.step, p.metric))

    @property
    def has_report(self) -> bool:
        """Whether a report was attached before."""
        progress = (self._progress or {}).get(f"{self._grid}/{REPORT}")
        return progress is not None and ATTACHED_TAG in progress.recorded.tags

    def attach(self, folder: Path) -> int:
        """Add the files below `folder` to the runs, those in `cell/ID` to a cell's; return how many runs they changed.

        Those in `report` go to a run of that name, which is made when it is missing. Call it after `tick`.
        """
        changed = 0
        for path in _attached(folder):
            key = f"{self._grid}/{path.relative_to(folder).as_posix()}"
            recorded = self._recorded(key, path.name)
            files = sorted(file for file in path.rglob("*") if file.is_file())
            content = [[str(file.relative_to(path)), file.read_text(encoding="utf-8")] for file in files]
            signature = digest(content)[:16]
            if recorded is None or recorded.tags.get(ATTACHED_TAG) == signature:
                continue
            self._tracker.attach(recorded, path)
            note = path / NOTE_FILE
            told = {NOTE_TAG: note.read_text(encoding="utf-8")} if note.is_file() else {}
            self._tracker.write(recorded, [], {}, {ATTACHED_TAG: signature, **told})
            changed += 1
        return changed

    def _recorded(self, key: str, name: str) -> Recorded | None:
        if self._progress is None:
            return None
        if key not in self._progress and name == REPORT:
            run = Run(key, REPORT, tags={"grid": self._grid, "kind": REPORT})
            recorded = self._tracker.create(run, "")
            self._tracker.finish(recorded, FINISHED, time.time())
            self._progress[key] = _Progress(recorded)
        progress = self._progress.get(key)
        return progress.recorded if progress else None


def _attached(folder: Path) -> list[Path]:
    report = [folder / REPORT] if (folder / REPORT).is_dir() else []
    return report + sorted(path for path in (folder / "cell").glob("*") if path.is_dir())


def _columns(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a table of the cells should show first: factors, then the metrics that decide."""
    metrics = [*document.get("primary", ()), *(name for name in USUAL_METRICS if name not in document["primary"])]
    return [("params", safe_name(name)) for name in document["factors"]] + [
        ("metrics", safe_name(f"eval/{name}")) for name in metrics
    ]


def _description(document: dict[str, Any]) -> str:
    stages = document["stages"].values()
    kinds = {kind: sum(1 for stage in stages if stage["kind"] == kind) for kind in ("train", "evaluate")}
    lines = [
        f"**{document['name']}** at scale `{document['scale']}`. {document.get('description', '')}".strip(),
        f"{len(document['cells'])} cells, {kinds['train']} training stages, {kinds['evaluate']} evaluations;"
        f" factors: {', '.join(document['factors'])}; the seed that varies: {document['seed']}.",
        "A cell's run holds the series of its last phase and its results; shared stages have runs of their own.",
        f"Everything here is a copy of the store: `moegrid sync {document['name']}` makes it again,"
        f" `moegrid report {document['name']}` writes the tables and figures.",
    ]
    return "\n\n".join(lines)

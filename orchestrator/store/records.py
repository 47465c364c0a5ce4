"""What the store says about a grid: its versions that were run, its attempts, their failures and series.

Root documents and manifests are the truth; submissions, failures and live series are advisory and may be absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import CorruptBlob, MoegridError
from orchestrator.store import Store
from orchestrator.store.attempts import Failure, Submission, series_folder
from orchestrator.store.manifest import Manifest

SERIES_BLOB = "series.json"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one job: the stages it was asked to run, and where."""

    id: str
    stages: tuple[str, ...]
    site: str
    batch: str


def grid_names(store: Store) -> list[str]:
    """Return the names of all grids that were ever run in this store."""
    return sorted({entry.path.split("/")[1] for entry in store.objects.list("grids")})


def with_sections(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a root document whose `cell["resolved"]["model"]` is the model, not the name of a shared section."""
    sections = document.get("sections", {})
    return {**document, "cells": [with_own_sections(cell, sections) for cell in document["cells"]]}


def with_own_sections(cell: Mapping[str, Any], sections: Mapping[str, object]) -> dict[str, Any]:
    """Return the entry of a cell with the sections that it names."""
    named = cell.get("resolved", {})
    resolved = {part: sections.get(name, {}) if isinstance(name, str) else name for part, name in named.items()}
    return {**cell, "resolved": resolved}


def versions(store: Store, name: str) -> list[tuple[str, float]]:
    """Return (path, time) of every version of the grid that was run, oldest first; one listing."""
    entries = sorted(store.objects.list(f"grids/{name}"), key=lambda entry: (entry.modified, entry.path))
    return [(entry.path, entry.modified) for entry in entries]


def documents(store: Store, name: str) -> list[dict[str, Any]]:
    """Return every planned version of the grid, oldest first, without those that are damaged."""
    found = store.objects.parallel(store.find_json, [path for path, _ in versions(store, name)])
    return [with_sections(body) for body in found if body is not None and _is_root(body)]


def _is_root(body: Mapping[str, Any]) -> bool:
    lists = all(isinstance(body.get(name), list) for name in ("cells", "keys"))
    return lists and isinstance(body.get("digest"), str) and all(isinstance(cell, dict) for cell in body["cells"])


def document(store: Store, name: str, digest: str = "") -> dict[str, Any]:
    """Return one version of the grid that was run, the newest unless `digest` (or its beginning) names one.

    Raises MoegridError when the store knows no such grid.
    """
    found = [doc for doc in documents(store, name) if doc["digest"].startswith(digest)]
    if not found:
        known = ", ".join(grid_names(store)) or "none"
        raise MoegridError(
            f"the store has no grid {name!r}" + (f" with digest {digest}" if digest else ""),
            cause=f"grids that were run in {store.objects.url}: {known}",
            hint=f"run it first: moegrid run {name}",
        )
    return found[-1]


class Submissions:
    """The grid's attempts in the order they were submitted; a submission is written once and so read once."""

    def __init__(self, store: Store, grid: str) -> None:
        self._store = store
        self._grid = grid
        self._known: dict[str, list[Attempt]] = {}

    def attempts(self) -> list[Attempt]:
        """Return every attempt that was submitted until now."""
        entries = sorted(self._store.objects.list("submissions"), key=lambda entry: (entry.modified, entry.path))
        new = [entry.path for entry in entries if entry.path not in self._known]
        for path, body in zip(new, self._store.objects.parallel(self._store.find_json, new), strict=True):
            if body is not None:
                self._known[path] = self._attempts(body)
        return [attempt for entry in entries for attempt in self._known.get(entry.path, ())]

    def _attempts(self, body: Mapping[str, object]) -> list[Attempt]:
        if body.get("grid") != self._grid:
            return []
        try:
            batch = Submission.parse(body)
        except ValueError:
            return []  # damaged: what it asked for is told by claims and failures alone
        return [Attempt(job.attempt, tuple(job.keys), batch.site, batch.batch) for job in batch.jobs]


def failures(store: Store, stages: Collection[str]) -> dict[str, Failure]:
    """Return stage -> its last failure that nobody pardoned, for those of `stages` that have one."""
    entries = sorted(store.objects.list("failures"), key=lambda entry: (entry.modified, entry.path))
    pardoned = {entry.path.removesuffix(".pardon") for entry in entries if entry.path.endswith(".pardon")}
    wanted = [
        entry.path
        for entry in entries
        if entry.path.endswith(".json")
        and entry.path.split("/")[1] in stages
        and entry.path.removesuffix(".json") not in pardoned
    ]
    found: dict[str, Failure] = {}
    for path, record in zip(wanted, store.objects.parallel(store.find_fixed, wanted), strict=True):
        if record is not None:
            stage, attempt = path.split("/")[1], path.split("/")[2].removesuffix(".json")
            failure = Failure.parse({**record, "stage": stage, "attempt": attempt})
            found[stage] = failure or Failure(stage, attempt, "", "")
    return found


def committed_rows(store: Store, manifests: Iterable[Manifest], damaged: dict[str, str]) -> dict[str, list[Row]]:
    """Return key -> the committed series of each training state that has one, in step order.

    One that is not what its manifest says is left out, and its cause put into `damaged`.
    """
    wanted = [m for m in manifests if any(blob.name == SERIES_BLOB for blob in m.blobs)]

    def read(manifest: Manifest) -> list[Row] | None:
        try:
            return ordered(_rows(json.loads(store.artifacts.read(manifest.blob(SERIES_BLOB)))))
        except CorruptBlob as error:
            damaged[manifest.key] = error.cause
            return None

    bodies = store.objects.parallel(read, wanted)
    return {m.key: rows for m, rows in zip(wanted, bodies, strict=True) if rows is not None}


class LiveSeries:
    """The series that running attempts append to, read chunk by chunk and never twice."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[str, str] = {}
        self._rows: dict[str, dict[int, Row]] = {}
        self._chunks = 0

    def refresh(self, tried: Iterable[Attempt], done: Mapping[str, object]) -> int:
        """Read the new chunks of attempts at stages that have no artifact yet; return how many were ever read."""
        for attempt in tried:
            if all(stage in done for stage in attempt.stages):
                continue
            prefix = series_folder(attempt.id)
            seen = self._seen.get(attempt.id, "")
            new = sorted(entry.path for entry in self._store.objects.list(prefix) if entry.path > seen)
            for path, chunk in zip(new, self._store.objects.parallel(self._store.find_json, new), strict=True):
                if chunk is None or not _is_chunk(chunk):
                    continue  # damaged: the committed series will have its rows
                rows = self._rows.setdefault(chunk["stage"], {})
                for row in chunk["rows"]:
                    # A resumed attempt repeats the steps after its checkpoint: the first telling stays.
                    rows.setdefault(int(row["step"]), row)
                self._seen[attempt.id] = path
                self._chunks += 1
        return self._chunks

    def rows(self, stage: str) -> list[Row]:
        """Return what is known of the stage's series, one row a step, in step order."""
        return [row for _, row in sorted(self._rows.get(stage, {}).items())]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Return `rows` in step order, one row a step (the last one told)."""
    return [row for _, row in sorted({int(row["step"]): row for row in rows}.items())]


def values(row: Row) -> dict[str, float]:
    """Return the finite metrics of a series row."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _is_chunk(chunk: Mapping[str, object]) -> bool:
    rows = chunk.get("rows")
    steps = isinstance(rows, list) and all(isinstance(r, dict) and isinstance(r.get("step"), int) for r in rows)
    return steps and isinstance(chunk.get("stage"), str)


def _rows(body: Any) -> list[Row]:
    rows: list[Row] = body["rows"] if isinstance(body, dict) else body
    return rows

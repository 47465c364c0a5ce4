"""Which runs a tracker should show for a grid: a pure projection of root documents and manifests.

One run a cell, named by the factors that differ and holding the stitched series of its last phase and its results; one
run a stage of training or evaluation, the child of its cell, or on its own when cells share it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.catalog.suites import SUITES
from orchestrator.errors import EXIT_UNREACHABLE, MoegridError
from orchestrator.spec.identity import digest
from orchestrator.spec.providers import Use
from orchestrator.spec.resolve import is_causal
from orchestrator.spec.rules import PHASES
from orchestrator.store.attempts import Failure
from orchestrator.store.manifest import Manifest
from orchestrator.store.records import Attempt, Row, values

RUNNING, SCHEDULED, FINISHED, FAILED, KILLED = "RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED"
TRACKED_KINDS = ("train", "evaluate", "generate", "judge")
LONGEST_TAG = 4000
LINEAGE = ("state", "tokenizer", "items", "tokens")
KEY_TAG = "moegrid.key"


class TrackerAway(MoegridError):
    """The tracker cannot be reached or refuses; nothing is lost, a later sync fills it in."""

    exit_code = EXIT_UNREACHABLE


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric at one step; `time` in seconds."""

    metric: str
    value: float
    step: int
    time: float


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set a run read: its name, where it comes from, its content digest."""

    name: str
    source: str
    digest: str
    context: str


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the tracker should hold."""

    key: str
    name: str
    parent: str = ""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()
    series: tuple[str, ...] = ()  # training stages whose rows this run shows, in order
    results: tuple[Point, ...] = ()
    status: str = RUNNING
    started: float = 0.0
    ended: float = 0.0
    settled: bool = False  # every artifact it shows is committed

    def signature(self) -> str:
        """Return a digest of what is shown: equal signatures need no second look."""
        points = [[p.metric, p.step, p.value] for p in self.results]
        return digest([self.name, self.parent, dict(self.tags), list(self.series), points, self.status])


@dataclass(slots=True)
class Recorded:
    """What the tracker already holds of a run: `last` is the highest recorded step of each metric."""

    id: str
    tags: dict[str, str]
    params: set[str]
    last: dict[str, int]
    status: str


class Tracker(Protocol):
    """Where runs are shown. Every call raises TrackerAway when the tracker cannot be reached."""

    def open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Sequence[tuple[str, str]]
    ) -> dict[str, Recorded]:
        """Make sure the experiment exists and return its runs by key.

        `columns` are the ("params" or "metrics", name) that a table of its cells should show.
        """

    def create(self, run: Run, parent: str) -> Recorded:
        """Create the run under the tracker's run id `parent` ("" for none)."""

    def write(
        self, recorded: Recorded, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Add points, params and tags in batches; the tags last, so that one of them may say that all is there."""

    def remove(self, recorded: Recorded, tags: Iterable[str]) -> None:
        """Remove tags."""

    def steps(self, recorded: Recorded, metric: str) -> set[int]:
        """Return the recorded steps of one metric."""

    def attach(self, recorded: Recorded, folder: Path) -> None:
        """Add the files below `folder` to the run, in place of those of the same names."""

    def finish(self, recorded: Recorded, status: str, ended: float) -> None:
        """Set the run's status."""


def four_digits(value: float) -> float:
    """Return a result as a tracker shows it: four decimals, of what is less than 0.1 four digits. The store has all."""
    return float(f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}")


def safe_name(name: str) -> str:
    """Return `name` with what trackers do not allow in metric and param names replaced by `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def points_of(rows: Iterable[Row]) -> Iterator[Point]:
    """Yield the points of series rows."""
    for row in rows:
        for metric, value in values(row).items():
            yield Point(safe_name(metric), value, int(row["step"]), float(row.get("time", 0.0)))


def project(
    documents: Sequence[Mapping[str, object]],
    manifests: Mapping[str, Manifest],
    attempts: Sequence[Attempt] = (),
    failures: Mapping[str, Failure] | None = None,
    *,
    live: Iterable[str] = (),
) -> list[Run]:
    """Return the runs of one grid, parents before children.

    `documents` are its planned versions, oldest first: cells of older versions stay when they were finished.
    `live` are the stages that some process works on now.
    """
    view = _View(documents, manifests, attempts, failures or {}, frozenset(live))
    runs = [run for cell in view.cells.values() if (run := view.cell_run(cell)) is not None]
    shown = {run.key for run in runs}
    return runs + [run for key in view.stages if (run := view.stage_run(key, shown)) is not None]


def flat(value: object, prefix: str = "") -> dict[str, str]:
    """Return nested mappings as dotted names with text values; empty values are left out."""
    if isinstance(value, Mapping):
        items = [flat(item, f"{prefix}.{name}" if prefix else str(name)) for name, item in value.items()]
        return {name: text for item in items for name, text in item.items()}
    if value is None or value == "" or value == []:
        return {}
    return {safe_name(prefix): value if isinstance(value, str) else json.dumps(value)}


class _View:
    def __init__(
        self,
        documents: Sequence[Mapping[str, Any]],
        manifests: Mapping[str, Manifest],
        attempts: Sequence[Attempt],
        failures: Mapping[str, Failure],
        live: frozenset[str],
    ) -> None:
        self.manifests, self.failures, self.live = manifests, failures, live
        self.sites = {attempt.id: attempt.site for attempt in attempts}
        self.newest = documents[-1]
        self.stages: dict[str, Mapping[str, Any]] = {}
        self.cells: dict[str, Mapping[str, Any]] = {}
        for document in documents:
            self.stages.update(document["stages"])
            current = document is self.newest
            kept = [cell for cell in document["cells"] if current or cell["final"] in manifests]
            self.cells.update({cell["id"]: cell for cell in kept})
        self.current = {cell["id"] for cell in self.newest["cells"]}
        self.users: dict[str, list[str]] = {}
        for cell in self.cells.values():
            for key in cell["stages"]:
                self.users.setdefault(key, []).append(cell["id"])

    def grid_tags(self) -> dict[str, str]:
        return {"grid": self.newest["name"], "scale": self.newest["scale"]}

    def cell_run(self, cell: Mapping[str, Any]) -> Run | None:
        train = [key for key in cell["stages"] if self.stages[key]["kind"] == "train"]
        last = self.stages[cell["final"]]["phase"]
        series = tuple(key for key in train if self.stages[key]["phase"] == last)
        # A base model that is still in training would otherwise show a run for each of ten thousand cells.
        if not any(key in self.manifests or key in self.live or key in self.failures for key in series):
            return None
        wanted = [cell["final"], *(result["key"] for result in cell["results"])]
        made = [self.manifests[key] for key in (*series, *wanted) if key in self.manifests]
        settled = all(key in self.manifests for key in wanted)
        resolved = cell.get("resolved", {})
        tags = {
            **self.grid_tags(),
            "kind": "cell",
            "cell": cell["id"],
            "setting": cell["setting"],
            "causal": json.dumps(is_causal(resolved.get("model", {}).get("moe", {}))),
            "shared": " ".join(key[:12] for key in train if len(self.users.get(key, ())) > 1)[:LONGEST_TAG],
            **self._origin(made),
            **self._failure(cell["stages"]),
        }
        params = {safe_name(name): str(value) for name, value in cell["factors"].items()}
        params |= {f"parameters.{name}": str(value) for name, value in cell.get("parameters", {}).items()}
        results = [point for result in cell["results"] for point in self._results(result["key"], result.get("step"))]
        return Run(
            key=f"{self.newest['name']}/cell/{cell['id']}",
            name=(cell["name"] or cell["id"]) + ("" if cell["id"] in self.current else " (earlier version)"),
            params={**flat(resolved), **params},
            tags={name: text for name, text in tags.items() if text},
            datasets=_datasets(resolved),
            series=series,
            results=tuple(results),
            status=self._status(cell["stages"], settled, bool(made)),
            started=min((m.created - float(m.info.get("train_seconds", 0.0)) for m in made), default=0.0),
            ended=max((m.created for m in made), default=0.0),
            settled=settled,
        )

    def stage_run(self, key: str, shown: set[str]) -> Run | None:
        stage = self.stages[key]
        manifest = self.manifests.get(key)
        if stage["kind"] not in TRACKED_KINDS or not (manifest or key in self.live or key in self.failures):
            return None
        users = self.users.get(key, [])
        if not users:
            return None
        parent = f"{self.newest['name']}/cell/{users[0]}" if len(users) == 1 else ""
        made = [manifest] if manifest else []
        tags = {
            **self.grid_tags(),
            "kind": stage["kind"],
            "stage": key,
            "phase": stage["phase"],
            "cell": users[0] if len(users) == 1 else "",
            "cells": " ".join(users)[:LONGEST_TAG] if len(users) > 1 else "",
            **_lineage(manifest),
            **self._origin(made),
            **self._failure([key]),
        }
        facts = {name: stage.get(name) for name in ("kind", "phase", "start", "stop", "frozen", "suite")}
        numerics = manifest.numerics if manifest else {}
        training = stage["kind"] == "train"
        return Run(
            key=f"{self.newest['name']}/stage/{key}",
            name=stage["label"] or f"{stage['kind']} {key[:12]}",
            parent=parent if parent in shown else "",
            params=flat({**facts, "numerics": numerics}),
            tags={name: text for name, text in tags.items() if text},
            datasets=self._read_by(stage, users[0]),
            series=(key,) if training else (),
            results=() if training else tuple(self._results(key, self._step_of(stage))),
            status=self._status([key], manifest is not None, False),
            started=manifest.created - float(manifest.info.get("train_seconds", 0.0)) if manifest else 0.0,
            ended=manifest.created if manifest else 0.0,
            settled=manifest is not None,
        )

    def _read_by(self, stage: Mapping[str, object], user: str) -> tuple[Dataset, ...]:
        """Return the data sets that a stage read: held-out text is the first one's last part."""
        found = _datasets(self.cells[user].get("resolved", {}))
        if stage["kind"] == "train":
            return tuple(one for one in found if one.context == stage["phase"])
        kind = SUITES.builtins.get(str(stage.get("suite", "")))
        if kind is not None and kind.reads == ("text",):
            return found[:1]
        return tuple(one for one in found if one.context == "evaluate")

    def _step_of(self, stage: Mapping[str, Any]) -> int:
        return int(self.stages.get(stage.get("state", ""), {}).get("stop", 0))

    def _results(self, key: str, step: int | None) -> list[Point]:
        manifest = self.manifests.get(key)
        if manifest is None:
            return []
        at = self._step_of(self.stages[key]) if step is None else step
        return [
            Point(safe_name(f"eval/{n}"), four_digits(float(v)), int(at), manifest.created)
            for n, v in sorted(manifest.metrics.items())
        ]

    def _status(self, keys: Sequence[str], settled: bool, begun: bool) -> str:
        if settled:
            return FINISHED
        if any(key in self.live for key in keys if key not in self.manifests):
            return RUNNING
        if any(key in self.failures for key in keys):
            return FAILED
        return KILLED if begun else SCHEDULED

    def _origin(self, made: Sequence[Manifest]) -> dict[str, str]:
        if not made:
            return {}
        latest = max(made, key=lambda m: m.created)
        commit = str(latest.provenance.get("git", ""))
        return {
            "attempt": latest.attempt,
            "site": self.sites.get(latest.attempt, ""),
            "git": commit,
            "mlflow.source.git.commit": commit,
            "job": str(latest.provenance.get("job", "")),
            "plugins": _plugins(made),
        }

    def _failure(self, keys: Sequence[str]) -> dict[str, str]:
        failed = [self.failures[key] for key in keys if key in self.failures]
        if not failed:
            return {}
        return {"failure": failed[0].kind, "failure.message": failed[0].message[:LONGEST_TAG]}


def _plugins(made: Sequence[Manifest]) -> str:
    """Return which packages and plugin files the artifacts were made with, with their versions, "" as a rule."""
    uses = (Use.from_json(told) for manifest in made for told in manifest.provenance.get("plugins", ()))
    return ", ".join(dict.fromkeys(str(use.origin) for use in uses))[:LONGEST_TAG]


def _lineage(manifest: Manifest | None) -> dict[str, str]:
    """Return the keys of the artifacts that a result was made from: the model's state, tokenizer, items, tokens."""
    if manifest is None:
        return {}
    return {f"parent.{role}": str(manifest.spec[role]) for role in LINEAGE if manifest.spec.get(role)}


def _datasets(resolved: Mapping[str, Any]) -> tuple[Dataset, ...]:
    found = []
    for phase in PHASES:
        data = (resolved.get(phase) or {}).get("data")
        if data:
            found.append(Dataset(f"{phase} {data['source'].rsplit('/', 1)[-1]}", data["source"], data["digest"], phase))
            mix = data.get("mix") or {}
            if mix.get("rows"):
                found.append(Dataset(f"{phase} mixed in", mix["source"], mix["digest"], phase))
    items = resolved.get("evaluate") or {}
    if items.get("source"):
        found.append(Dataset("evaluation items", items["source"], items.get("digest", ""), "evaluate"))
    for name, benchmark in items.items():
        if isinstance(benchmark, Mapping) and benchmark.get("source"):
            found.append(Dataset(name, benchmark["source"], benchmark.get("digest", ""), "evaluate"))
    return tuple(found)

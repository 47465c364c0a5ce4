"""Damage: blobs that changed after their commit, artifacts made from replaced parents.

Blobs are written once, before their manifest: one that is newer than its manifest was altered. A flipped byte leaves
no such trace, so that blobs are read and compared as well, all of a small store. `heal` makes what is damaged absent,
and the plan makes it again, whether something still needs it or not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.engine.mending import Mending
from orchestrator.plan.graph import StageGraph
from orchestrator.store import Blob, Manifest, Store
from orchestrator.store.manifest import OBSERVATIONS
from orchestrator.store.repairs import owner_of

# File systems stamp in ticks of a few milliseconds.
SLACK_SECONDS = 0.05
# What a run reads at its beginning to find damage: from a folder, and over a network.
READ_BYTES = float(2**30)
READ_BYTES_REMOTE = 64.0 * 2**20
# Of a bucket with more artifacts of the grid than this, manifests are read only to verify everything.
MOST_MANIFESTS = 2000
# Manifests that are read at once.
BATCH = 4096
# Kinds of artifacts whose blobs reports read.
MEASURED = ("evaluate", "generate", "judge")


@dataclass(frozen=True, slots=True)
class Audit:
    """The grid's artifacts that are sound, and key -> what was wrong with those that are absent now.

    `listed`: how many artifacts the store has, of all grids. `waits`: sound but for files of other states, which are
    made again -> these states.
    """

    sound: frozenset[str]
    wrong: Mapping[str, str]
    listed: int = 0
    waits: Mapping[str, frozenset[str]] = field(default_factory=dict)


def heal(store: Store, graph: StageGraph, *, thorough: bool = False) -> Audit:
    """Discard the grid's damaged and stale artifacts.

    Blobs that reports read come first, then the others by size, as many as READ_BYTES allow; `thorough` reads all.
    What a listing of a folder gives away is found in any case.
    """
    times = store.artifacts.times()
    present = times.keys() & graph.stages.keys()
    wrong: dict[str, str] = {}
    mending = Mending(store, graph)
    local = store.objects.local_path("artifacts") is not None
    if thorough or local or len(present) <= MOST_MANIFESTS:
        limit = math.inf if thorough else READ_BYTES if local else READ_BYTES_REMOTE
        blobs = _Blobs(limit)
        order = sorted(present)
        # No more manifests at once than this: a grid of a hundred thousand cells has a quarter of a million.
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            manifests = store.artifacts.many(batch)
            wrong |= dict.fromkeys(set(batch) - manifests.keys(), "its manifest is damaged")
            for key, manifest in manifests.items():
                blobs.add(manifest, suspicious=_suspicious(store, manifest, times[key]))
        for key, damaged in _verified(store, blobs.chosen()).items():
            found = store.artifacts.get(key)
            # Unless somebody has made it again meanwhile.
            if found is not None and found.attempt == blobs.attempts[key]:
                mending.discard(found, damaged.keys())
            wrong |= dict.fromkeys(mending.waits.get(key, [key]), next(iter(damaged.values())))
    for key in _stale(store, graph, present - wrong.keys(), times):
        store.artifacts.discard(key)
        wrong[key] = "a parent was made again with other bits"
    return Audit(frozenset(present - wrong.keys()), wrong, len(times), mending.waits)


class _Blobs:
    """The blobs to read: all of suspicious artifacts, then those of results and series, then the smallest.

    As many of the others as `limit` bytes allow; more are not even remembered.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._first: list[Blob] = []
        self._others: list[tuple[bool, int, str, Blob]] = []
        self._bytes = self._trimmed = 0.0
        self.attempts: dict[str, str] = {}  # artifact -> who made it

    def add(self, manifest: Manifest, *, suspicious: bool) -> None:
        """Take the blobs of a manifest into account."""
        if manifest.blobs:
            self.attempts[manifest.key] = manifest.attempt
        if suspicious:
            self._first += manifest.blobs
            return
        for blob in manifest.blobs:
            rank = manifest.kind not in MEASURED and blob.name not in OBSERVATIONS
            self._others.append((rank, blob.size, manifest.key, blob))
            self._bytes += blob.size
        if self._bytes > self._trimmed + 2 * self._limit:
            self._trim()

    def chosen(self) -> list[Blob]:
        """Return what is to be read."""
        self._trim()
        return self._first + [blob for *_, blob in self._others]

    def _trim(self) -> None:
        self._others.sort(key=lambda item: item[:3])
        left, kept = self._limit, 0
        for _, size, _, _ in self._others:
            left -= size
            if left < 0:
                break
            kept += 1
        del self._others[kept:]
        self._bytes = self._trimmed = float(sum(size for _, size, _, _ in self._others))


def _verified(store: Store, blobs: Sequence[Blob]) -> dict[str, dict[Blob, str]]:
    """Read blobs; return the artifacts that are damaged, with their damaged blobs and the causes.

    A file that several of them name is read once. Those come first for which it was written.
    """
    once = {blob.path: blob for blob in blobs}
    causes = dict(zip(once, store.objects.parallel(store.artifacts.damage, list(once.values())), strict=True))
    found: dict[str, dict[Blob, str]] = {}
    for blob in sorted(blobs, key=lambda blob: owner_of(blob) != blob.artifact):
        if causes[blob.path]:
            found.setdefault(blob.artifact, {})[blob] = causes[blob.path]
    return found


def _suspicious(store: Store, manifest: Manifest, committed: float) -> bool:
    for blob in manifest.blobs:
        path = store.objects.local_path(blob.path)
        if path is None:
            return False
        try:
            status = os.stat(path)
        except OSError:
            return True
        if status.st_size != blob.size or status.st_mtime > committed + SLACK_SECONDS:
            return True
    return False


def _stale(
    store: Store,
    graph: StageGraph,
    present: Collection[str],
    times: dict[str, float],
) -> list[str]:
    """Return the artifacts whose parents were replaced after them by other bits, and all that was made from those."""
    suspects = [
        key
        for key in graph.stages
        if key in present and any(times.get(p, 0.0) > times[key] for p in graph.stages[key].parents if p in present)
    ]
    if not suspects:
        return []
    stale = store.artifacts.stale(store.artifacts.many(suspects).values())
    for key, stage in graph.stages.items():
        if key in present and any(parent in stale for parent in stage.parents):
            stale.add(key)
    return [key for key in graph.stages if key in stale]

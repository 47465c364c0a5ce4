"""Damage that a listing gives away: blobs that changed after their commit, artifacts made from replaced parents.

Blobs are written once, before their manifest. One that is newer than its manifest was altered; only those are read
and compared. `heal` makes what is damaged absent, and the plan makes it again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from orchestrator.errors import CorruptBlob
from orchestrator.plan.graph import StageGraph
from orchestrator.store import Manifest, Store

# File systems stamp in ticks of a few milliseconds.
SLACK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Audit:
    """The grid's artifacts that are sound, and key -> what was wrong with those that are absent now."""

    sound: frozenset[str]
    wrong: Mapping[str, str]


def heal(store: Store, graph: StageGraph, *, thorough: bool = False) -> Audit:
    """Discard the grid's damaged and stale artifacts.

    `thorough` reads every blob. Otherwise a folder is searched for altered files; a bucket, which
    keeps checksums of its own, is trusted.
    """
    times = store.artifacts.times()
    present = times.keys() & graph.stages.keys()
    manifests: dict[str, Manifest] = {}
    wrong: dict[str, str] = {}
    if thorough or store.objects.local_path("artifacts") is not None:
        manifests = store.artifacts.many(present)
        wrong = dict.fromkeys(present - manifests.keys(), "its manifest is damaged")
        for key, manifest in manifests.items():
            if not thorough and not _suspicious(store, manifest, times[key]):
                continue
            try:
                store.artifacts.verify(key)
            except CorruptBlob as error:
                store.artifacts.discard(key, attempt=manifest.attempt)
                wrong[key] = error.cause
    for key in _stale(store, graph, present - wrong.keys(), times, manifests):
        store.artifacts.discard(key)
        wrong[key] = "a parent was made again with other bits"
    return Audit(frozenset(present - wrong.keys()), wrong)


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
    manifests: dict[str, Manifest],
) -> list[str]:
    """Return the artifacts whose parents were replaced after them by other bits, and all that was made from those."""
    suspects = [
        key
        for key in graph.stages
        if key in present and any(times.get(p, 0.0) > times[key] for p in graph.stages[key].parents if p in present)
    ]
    if not suspects:
        return []
    stale = store.artifacts.stale(
        [m for key in suspects if (m := manifests.get(key) or store.artifacts.get(key)) is not None]
    )
    for key, stage in graph.stages.items():
        if key in present and any(parent in stale for parent in stage.parents):
            stale.add(key)
    return [key for key in graph.stages if key in stale]

"""Damage: blobs that changed after their commit, artifacts made from replaced parents.

Blobs are written once, before their manifest: one that is newer than its manifest was altered. A flipped byte leaves
no such trace, so that blobs are read and compared as well, all of a small store. `heal` makes what is damaged absent,
and the plan makes it again, whether something still needs it or not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.plan.graph import StageGraph
from orchestrator.store import Blob, Manifest, Store
from orchestrator.store.artifacts import OBSERVATIONS

# File systems stamp in ticks of a few milliseconds.
SLACK_SECONDS = 0.05
# What a run reads at its beginning to find damage: from a folder, and over a network.
READ_BYTES = float(2**30)
READ_BYTES_REMOTE = 64.0 * 2**20
# Of a bucket with more artifacts of the grid than this, manifests are read only to verify everything.
MOST_MANIFESTS = 2000
# Kinds of artifacts whose blobs reports read.
MEASURED = ("evaluate", "generate", "judge")


@dataclass(frozen=True, slots=True)
class Audit:
    """The grid's artifacts that are sound, and key -> what was wrong with those that are absent now."""

    sound: frozenset[str]
    wrong: Mapping[str, str]


def heal(store: Store, graph: StageGraph, *, thorough: bool = False) -> Audit:
    """Discard the grid's damaged and stale artifacts.

    Blobs that reports read come first, then the others by size, as many as READ_BYTES allow; `thorough` reads all.
    What a listing of a folder gives away is found in any case.
    """
    times = store.artifacts.times()
    present = times.keys() & graph.stages.keys()
    manifests: dict[str, Manifest] = {}
    wrong: dict[str, str] = {}
    local = store.objects.local_path("artifacts") is not None
    if thorough or local or len(present) <= MOST_MANIFESTS:
        manifests = store.artifacts.many(present)
        wrong = dict.fromkeys(present - manifests.keys(), "its manifest is damaged")
        suspects = {key for key, manifest in manifests.items() if _suspicious(store, manifest, times[key])}
        limit = math.inf if thorough else READ_BYTES if local else READ_BYTES_REMOTE
        for key, cause in _verified(store, _to_read(manifests, suspects, limit)).items():
            store.artifacts.discard(key, attempt=manifests[key].attempt, damaged=True)
            wrong[key] = cause
    for key in _stale(store, graph, present - wrong.keys(), times, manifests):
        store.artifacts.discard(key)
        wrong[key] = "a parent was made again with other bits"
    return Audit(frozenset(present - wrong.keys()), wrong)


def _to_read(manifests: Mapping[str, Manifest], suspects: Collection[str], limit: float) -> list[Blob]:
    """Return the blobs to read: all of suspicious artifacts, then those of results and series, then the smallest."""
    chosen = [blob for key in suspects for blob in manifests[key].blobs]
    others = [
        (manifest.kind not in MEASURED and blob.name not in OBSERVATIONS, blob.size, key, blob)
        for key, manifest in manifests.items()
        if key not in suspects
        for blob in manifest.blobs
    ]
    for _, size, _, blob in sorted(others, key=lambda item: item[:3]):
        limit -= size
        if limit < 0:
            break
        chosen.append(blob)
    return chosen


def _verified(store: Store, blobs: Sequence[Blob]) -> dict[str, str]:
    """Read blobs; return the artifacts that are damaged, with the cause."""
    causes = store.objects.parallel(store.artifacts.damage, blobs)
    return {blob.artifact: cause for blob, cause in zip(blobs, causes, strict=True) if cause}


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

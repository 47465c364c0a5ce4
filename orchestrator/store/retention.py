"""Retention: what no grid version needs is marked, and after a grace period deleted.

Truth: `grids/<name>/<digest>.json`, each with the `keys` of its artifacts. Alive are those, their parents, whatever an
attempt with a live lease made or reads, and the states that an unfinished grid could resume from. A blob that several
artifacts name goes with the last of them.
Marks lie in `tombstones/marked/`, and only age. To delete, an artifact is put under `tombstones/dying/`, where plans
take it for absent, and then the roots are listed again. A plan writes its root before it looks for tombstones, so
either the collector sees the root and lets go, or the plan sees the tombstone and makes the artifact anew; a commit
at that moment takes the dying manifest's place by compare-and-swap. The manifest goes first, then its blobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.store import Store
from orchestrator.store.artifacts import DYING, DYING_SECONDS
from orchestrator.store.attempts import Submission, batch_of, submission_path
from orchestrator.store.manifest import Manifest
from orchestrator.store.objects import Entry
from orchestrator.store.repairs import FOLDER as REPAIRS

MARKED = "tombstones/marked"
GRACE_SECONDS = 7 * 86400.0
# A write in progress can own a temporary file for this long.
_TEMPORARY_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What a collection would do: artifacts to mark, unmark and delete (keys), and stray objects."""

    keep: frozenset[str]
    mark: tuple[str, ...]
    unmark: tuple[str, ...]
    delete: tuple[str, ...]
    strays: tuple[Entry, ...]
    delete_bytes: int
    grace_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON types, for `moegrid gc --json`."""
        return {
            "keep": len(self.keep),
            "mark": list(self.mark),
            "unmark": list(self.unmark),
            "delete": list(self.delete),
            "strays": [entry.path for entry in self.strays],
            "delete_bytes": self.delete_bytes,
            "grace_seconds": self.grace_seconds,
        }


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did: keys deleted, keys let go because they were wanted again, objects and bytes freed."""

    deleted: tuple[str, ...]
    spared: tuple[str, ...]
    objects: int
    bytes: int


def grid_roots(store: Store) -> set[str]:
    """Return the artifact keys of every grid version that was ever run in this store."""
    return {key for document in store.roots().values() for key in document.get("keys", ())}


def plan_gc(store: Store, roots: Iterable[str], grace_seconds: float = GRACE_SECONDS) -> GcPlan:
    """Return what `collect` would do now; nothing is changed.

    `roots` are artifact keys to keep (`grid_roots(store)`); ages are by the store's clock.
    """
    now = store.objects.now()
    awaited = store.artifacts.repairs.awaited()  # before the manifests: what was put back is in one of the two
    marked = {_key(entry): entry.modified for entry in store.objects.list(MARKED)}
    dying = {_key(entry) for entry in store.objects.list(DYING)}
    manifests = store.artifacts.load_many(store.artifacts.keys() | dying)
    claims = store.claims.states()
    working = {claim.attempt for claim in claims.values() if claim.live}
    roots = set(roots)
    keep = _alive(store, manifests, roots, working)
    doomed = sorted(key for key in manifests if key not in keep)
    delete = [key for key in doomed if key in dying or now - marked.get(key, now) > grace_seconds or grace_seconds <= 0]
    referenced = {blob.path for manifest in manifests.values() for blob in manifest.blobs}
    referenced |= {path for key in awaited.keys() - manifests.keys() for path in awaited[key]}
    attempts = working | {claim.attempt for claim in claims.values()}
    attempts |= {manifest.attempt for manifest in manifests.values()}
    # Without a grace period age is no question: a file's time can lie a tick ahead of the clock that was just read.
    before = now - grace_seconds if grace_seconds > 0 else math.inf
    strays = [
        entry
        for entry in _old(store, "blobs", before)
        if entry.path not in referenced and entry.path.split("/")[1] not in working
    ]
    strays += [entry for entry in _old(store, "attempts", before) if _attempt(entry) not in attempts]
    # Scored items of an evaluation that nobody goes on with: `partial/<stage>/...`.
    at_work = {stage for stage, claim in claims.items() if claim.live}
    partial = _old(store, "partial", before)
    strays += [entry for entry in partial if entry.path.split("/")[1] not in at_work]
    repairs = _old(store, REPAIRS, before)
    strays += [entry for entry in repairs if _key(entry) in manifests or _key(entry) not in roots]
    left = {blob.path for key in manifests.keys() - set(delete) for blob in manifests[key].blobs}
    freed = {blob.path: blob.size for key in delete for blob in manifests[key].blobs if blob.path not in left}
    return GcPlan(
        keep=frozenset(keep & manifests.keys()),
        mark=tuple(key for key in doomed if key not in marked and key not in delete),
        unmark=tuple(sorted((marked.keys() | dying) - set(doomed))),
        delete=tuple(delete),
        strays=tuple(strays),
        delete_bytes=sum(freed.values()) + sum(entry.size for entry in strays),
        grace_seconds=grace_seconds,
    )


def collect(store: Store, plan: GcPlan, list_roots: Callable[[], set[str]] | None = None) -> Collected:
    """Carry `plan` out; what became alive since it was made is spared.

    `list_roots` is asked again after the tombstones are set (default: `grid_roots`). SIGKILL at any moment leaves a
    store that is right for everybody and that the next collection finishes.
    """
    objects = store.objects
    for key in plan.unmark:
        objects.delete(f"{MARKED}/{key}.json")
        objects.delete(f"{DYING}/{key}.json")
    for key in plan.mark:
        objects.create(f"{MARKED}/{key}.json", b"{}")
    begin = objects.now()
    for key in plan.delete:
        objects.put(f"{DYING}/{key}.json", b"{}")
    roots = list_roots() if list_roots else grid_roots(store)
    working = {claim.attempt for claim in store.claims.states().values() if claim.live}
    manifests = store.artifacts.load_many(store.artifacts.keys() | set(plan.delete))
    alive = _alive(store, manifests, roots, working)
    deleted, spared = [], []
    for key in plan.delete:
        doomed = manifests.get(key)
        late = objects.now() - begin > DYING_SECONDS / 2
        if doomed is not None and (late or key in alive or not _discard(store, doomed)):
            spared.append(key)
        else:
            deleted.append(key)
        objects.delete(f"{DYING}/{key}.json")
        if not late:
            objects.delete(f"{MARKED}/{key}.json")
    awaited = store.artifacts.repairs.awaited()
    kept = store.artifacts.load_many(store.artifacts.keys()).values()
    referenced = {blob.path for manifest in kept for blob in manifest.blobs}.union(*awaited.values())
    gone = {blob.path: blob.size for key in deleted if key in manifests for blob in manifests[key].blobs}
    gone |= {entry.path: entry.size for entry in plan.strays if _attempt(entry) not in working}
    paths = sorted(gone.keys() - referenced)
    objects.parallel(objects.delete, paths)
    objects.sweep(objects.now() - max(plan.grace_seconds, _TEMPORARY_SECONDS))
    return Collected(tuple(deleted), tuple(spared), len(paths), sum(gone[path] for path in paths))


def _discard(store: Store, doomed: Manifest) -> bool:
    return store.artifacts.discard(doomed.key, attempt=doomed.attempt, digest=doomed.digest)


def _alive(store: Store, manifests: Mapping[str, Manifest], roots: set[str], working: set[str]) -> set[str]:
    """The keys to keep: roots, what working attempts made or read, states that unfinished grids resume, all parents."""
    alive = roots | {key for key, manifest in manifests.items() if manifest.attempt in working}
    alive |= _read_by(store, working)
    _add_parents(alive, manifests)
    if not _unfinished(store, manifests):
        return alive
    states = {key: set(manifest.parents) for key, manifest in manifests.items() if manifest.kind == "train"}
    while grown := {key for key, parents in states.items() if key not in alive and not alive.isdisjoint(parents)}:
        alive |= grown
        _add_parents(alive, manifests)
    return alive


def _read_by(store: Store, working: set[str]) -> set[str]:
    """Return the artifacts that the stages of working attempts read; what they make may name their files."""
    paths = {submission_path(batch_of(attempt)) for attempt in working}
    found: set[str] = set()
    for document in store.objects.parallel(store.find_json, sorted(paths)):
        try:
            jobs = Submission.parse(document or {}).jobs
        except ValueError:
            continue  # damaged: its job cannot be read by a node either
        found |= {key for job in jobs if job.attempt in working for stage in job.stages for key in stage.parents}
    return found


def _unfinished(store: Store, manifests: Mapping[str, Manifest]) -> bool:
    """Whether training is left to do in the newest version of some grid: it would resume from states in between."""
    newest: dict[str, Entry] = {}
    for entry in store.objects.list("grids"):
        name = entry.path.split("/")[1]
        if name not in newest or entry.modified >= newest[name].modified:
            newest[name] = entry
    documents = store.roots() if newest else {}
    for entry in newest.values():
        document = documents.get(entry.path, {"keys": ()})
        stages = document.get("stages", {})
        for key in document["keys"]:
            if key not in manifests and stages.get(key, {}).get("kind", "train") == "train":
                return True
    return False


def _add_parents(alive: set[str], manifests: Mapping[str, Manifest]) -> None:
    waiting = list(alive)
    while waiting:
        manifest = manifests.get(waiting.pop())
        for parent in manifest.parents if manifest else ():
            if parent not in alive:
                alive.add(parent)
                waiting.append(parent)


def _old(store: Store, folder: str, before: float) -> list[Entry]:
    return [entry for entry in store.objects.list(folder) if entry.modified <= before]


def _attempt(entry: Entry) -> str:
    return entry.path.split("/")[1]


def _key(entry: Entry) -> str:
    return entry.path.rsplit("/", 1)[-1].removesuffix(".json")

"""Damaged files that several states name: the state that they were written for is made again, the others wait."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from orchestrator.plan.graph import StageGraph
from orchestrator.store import Blob, Manifest, Store
from orchestrator.store.repairs import owner_of


class Mending:
    """What of a grid waits for another state's files; `waits` are those states, and whose files they wait for."""

    def __init__(self, store: Store, graph: StageGraph, waits: Mapping[str, frozenset[str]] | None = None) -> None:
        self._artifacts = store.artifacts
        self.graph = graph
        self.waits = dict(waits or {})

    def heal(self, key: str) -> None:
        """Read an artifact's files and discard what must be made again if some are damaged."""
        manifest = self._artifacts.get(key)
        damaged = self._artifacts.damaged_blobs(manifest) if manifest is not None else []
        if manifest is not None and damaged:
            self.discard(manifest, damaged)

    def discard(self, manifest: Manifest, damaged: Collection[Blob]) -> bool:
        """Discard an artifact of which these blobs are damaged; False where it only waits for their owner's repair."""
        owners = frozenset(map(owner_of, damaged))
        if not all(self._mendable(owner, damaged) for owner in owners):
            self._artifacts.discard_damaged(manifest, damaged)
            return True
        for owner in owners:
            made = self._artifacts.get(owner)
            if made is not None:
                self._artifacts.discard_damaged(made, [blob for blob in made.blobs if blob.path in _paths(damaged)])
        if manifest.key in owners:
            return True
        self.waits[manifest.key] = owners
        return False

    def settle(self, present: Collection[str], hopeless: Callable[[str], bool]) -> frozenset[str]:
        """Return the states that waited in vain and are discarded now.

        What they waited for was made again with other bytes, or is `hopeless`: nobody makes it again.
        """
        lost: set[str] = set()
        for key, owners in list(self.waits.items()):
            absent = [owner for owner in owners if owner not in present]
            if absent and not any(map(hopeless, absent)):
                continue
            del self.waits[key]
            manifest = self._artifacts.get(key)
            damaged = self._artifacts.damaged_blobs(manifest) if manifest is not None else []
            if manifest is not None and damaged:
                self._artifacts.discard_damaged(manifest, damaged)
                lost.add(key)
        return frozenset(lost)

    @property
    def held(self) -> frozenset[str]:
        """The stages that read what waits."""
        return frozenset(child for key in self.waits if key in self.graph.stages for child in self.graph.children(key))

    def _mendable(self, owner: str, damaged: Iterable[Blob]) -> bool:
        """Whether a state of the grid, made again, puts those of the blobs that are its own back where they lay."""
        if owner not in self.graph.stages:
            return False
        made = self._artifacts.get(owner)
        files = made.blobs if made is not None else self._artifacts.repairs.expected(owner)
        return {blob.path for blob in damaged if owner_of(blob) == owner} <= _paths(files)


def _paths(blobs: Iterable[Blob]) -> set[str]:
    return {blob.path for blob in blobs}

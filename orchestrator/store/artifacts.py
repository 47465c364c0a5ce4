"""Artifacts: a manifest under its key, and the blobs that one attempt wrote for it.

Truth: `artifacts/<key>.json`. An artifact exists if and only if its manifest does; blobs are written first, the
manifest last by put-if-absent, and that is the commit. What is discarded (damaged, stale, collected) leaves a marker
with the last generation in place of the manifest, so that discarding, committing and repairing are all one
compare-and-swap on one object, and a listing with sizes is enough to tell what exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import CorruptBlob, StoreError
from orchestrator.store.manifest import Blob, Manifest
from orchestrator.store.objects import Entry, Objects, check_path
from orchestrator.store.repairs import Repairs, owner_of

FOLDER = "artifacts"
# One object per artifact that `gc` is deleting; whoever commits such an artifact takes its place instead.
DYING = "tombstones/dying"
# A collector lets go of what it has not deleted by half of this time; after all of it a tombstone is void.
DYING_SECONDS = 600.0
# A manifest holds at least its field names; a marker `{"generation":n}` is always shorter than this.
_MARKER_LIMIT = 64


class Artifacts:
    """Reading and committing artifacts of one store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self.repairs = Repairs(objects, self.damage)
        # Blobs of one process share a folder of their own under the attempt's, so nothing is ever overwritten, not
        # even by a duplicate of the same attempt or by a second artifact with a blob of the same name.
        self._folders: dict[str, tuple[str, set[str]]] = {}

    def keys(self) -> set[str]:
        """Return the keys of all artifacts but those that `gc` is deleting at this moment."""
        return {key for key, _ in self.entries()}

    def times(self) -> dict[str, float]:
        """Return key -> time of the commit, by the store's clock, of the same artifacts."""
        return {key: entry.modified for key, entry in self.entries()}

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yield key and listed manifest of the same artifacts.

        The order matters: who has recorded its grid and then sees no tombstone will be seen by the collector.
        """
        dying = self._all_dying()
        cut = len(FOLDER) + 1
        for entry in self._objects.list(FOLDER):
            if entry.size >= _MARKER_LIMIT and (key := entry.path[cut:-5]) not in dying:
                yield key, entry

    def get(self, key: str) -> Manifest | None:
        """Return the manifest, or None; None as well for what `gc` is deleting at this moment."""
        return None if self._dying(key) else self.load(key)

    def many(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """Return the manifests of those of `keys` that exist."""
        return self.load_many(set(keys) - self._all_dying())

    def load(self, key: str) -> Manifest | None:
        """Return the manifest, or None, whether it is being deleted or not.

        A damaged manifest is discarded on sight: its artifact must be made again.
        """
        data = self._objects.get(_path(key))
        if data is None or len(data) < _MARKER_LIMIT:
            return None
        return Manifest.from_bytes(data) or self._discard_damaged(key)

    def load_many(self, keys: Iterable[str]) -> dict[str, Manifest]:
        """Return what `load` finds for each of `keys`."""
        found = self._objects.parallel(self.load, sorted(set(keys)))
        return {manifest.key: manifest for manifest in found if manifest is not None}

    def write_blob(self, attempt: str, name: str, source: Path | bytes) -> Blob:
        """Write a blob below `blobs/<attempt>/`, never over another one, and return where it lies."""
        check_path(f"{attempt}/{name}")
        if isinstance(source, Path):
            path = self._blob_path(attempt, name)
            size, sha256 = self._objects.upload(path, source)
            return Blob(name, path, size, sha256)
        while not self._objects.create(path := self._blob_path(attempt, name), source):
            pass
        return Blob(name, path, len(source), hashlib.sha256(source).hexdigest())

    def commit(self, manifest: Manifest) -> Manifest:
        """Make the artifact exist; return the winner's manifest, which is another's if it came first.

        In place of a discarded artifact the generation is one more than that one's; where that was damaged, files with
        the same bytes are put back to where others name them. A training state that was kept without its optimizer's
        state gives way to the same state with it.
        """
        path = _path(manifest.key)
        fresh = replace(manifest, generation=0, created=manifest.created or self._objects.now())
        if self._objects.create(path, fresh.to_bytes()):
            return fresh
        while True:
            # Tombstone before manifest: when it is not there, a collector has finished or will see our grid.
            dying = self._dying(manifest.key)
            found = self._objects.get_versioned(path)
            if found is None:
                if self._objects.create(path, fresh.to_bytes()):
                    return fresh
                continue
            winner = Manifest.from_bytes(found[0])
            whole = None if winner is None or dying else fresh.completing(winner)
            if winner is not None and not dying and whole is None:
                return winner
            repaired = winner is None and _is_damage(found[0])
            made = self.repairs.put_back(fresh) if repaired else whole or fresh
            again = replace(made, generation=_generation(found[0]) + 1)
            if self._objects.replace(path, again.to_bytes(), found[1]):
                if repaired:
                    self.repairs.done(manifest.key)
                if dying:
                    self._objects.delete(_tombstone(manifest.key))
                return again

    def damaged(self, keys: Collection[str]) -> set[str]:
        """Return those of `keys` that are absent because they were found damaged, and are to be made again."""
        marked = [e.path for e in self._objects.list(FOLDER) if e.size < _MARKER_LIMIT and _key(e.path) in keys]
        bodies = self._objects.parallel(self._objects.get, marked)
        return {_key(path) for path, body in zip(marked, bodies, strict=True) if body is not None and _is_damage(body)}

    def discard(self, key: str, *, digest: str = "", attempt: str = "", damaged: bool = False) -> bool:
        """Make the artifact absent, so that the next plan makes it again; its blobs stay for `gc`.

        With `digest` or `attempt` only if the present manifest has that digest or attempt; False if not, or absent.
        `damaged` says why, for `damaged()`.
        """
        found = self._objects.get_versioned(_path(key))
        if found is None or len(found[0]) < _MARKER_LIMIT:
            return False
        present = Manifest.from_bytes(found[0])
        if present and ((digest and present.digest != digest) or (attempt and present.attempt != attempt)):
            return False
        return self._objects.replace(_path(key), _marker(found[0], damaged=damaged), found[1])

    def heal(self, key: str) -> bool:
        """Discard the artifact if one of its blobs is damaged or gone; True if that was so."""
        manifest = self.get(key)
        if manifest is None or not (damaged := self.damaged_blobs(manifest)):
            return False
        self.discard_damaged(manifest, damaged)
        return True

    def damaged_blobs(self, manifest: Manifest) -> list[Blob]:
        """Return those of an artifact's blobs that are damaged or gone."""
        return [blob for blob in manifest.blobs if self.damage(blob)]

    def discard_damaged(self, manifest: Manifest, damaged: Iterable[Blob]) -> None:
        """Discard an artifact of which these blobs are damaged, unless somebody has made it again meanwhile."""
        if any(owner_of(blob) == manifest.key for blob in damaged):
            found = self._objects.read(_path(manifest.key))
            self.repairs.expect(manifest, found.modified if found is not None else 0.0)
        self.discard(manifest.key, attempt=manifest.attempt, damaged=True)

    def damage(self, blob: Blob) -> str:
        """Return what is wrong with a blob, "" if nothing is; read twice, for a server in trouble answers anything."""
        try:
            self.verify_blob(blob)
        except CorruptBlob:
            try:
                self.verify_blob(blob)
            except CorruptBlob as error:
                return error.cause
        return ""

    def verify(self, key: str) -> None:
        """Read every blob of the artifact; CorruptBlob if one is damaged or gone, StoreError if there is none."""
        manifest = self.get(key)
        if manifest is None:
            raise StoreError(f"artifact {key[:12]} does not exist")
        self._verify(manifest)

    def verify_blob(self, blob: Blob) -> None:
        """Read the blob and compare its size and sha256; CorruptBlob if they differ or it is gone."""
        sha256 = hashlib.sha256()
        size = 0
        chunks = self._objects.chunks(blob.path)
        for chunk in chunks if chunks is not None else ():
            sha256.update(chunk)
            size += len(chunk)
        self._compare(blob, None if chunks is None else size, sha256.hexdigest())

    def read(self, blob: Blob) -> bytes:
        """Return the blob's bytes; CorruptBlob if they are not what the manifest says."""
        data = self._objects.get(blob.path)
        self._compare(blob, None if data is None else len(data), hashlib.sha256(data or b"").hexdigest())
        assert data is not None
        return data

    def fetch(self, manifest: Manifest, name: str, directory: Path) -> Path:
        """Copy a blob to `directory/name`, verified; the file appears whole or not at all."""
        blob = manifest.blob(name)
        target = directory / check_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            if (chunks := self._objects.chunks(blob.path)) is None:
                self._compare(blob, None, "")
            sha256 = hashlib.sha256()
            size = 0
            with part.open("wb") as file:
                for chunk in chunks or ():
                    sha256.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
            self._compare(blob, size, sha256.hexdigest())
            part.replace(target)
        except OSError as error:
            raise StoreError(
                f"cannot write {target}", cause=str(error), hint="free some space or choose another scratch folder"
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return target

    def stale(self, manifests: Iterable[Manifest]) -> set[str]:
        """Return the keys of those made from other bits than their parents hold now.

        A parent that no longer exists proves nothing: it was collected, or its repair may reproduce it.
        """
        children = list(manifests)
        known = {child.key: child for child in children}
        known |= self.many({parent for child in children for parent in child.parents} - set(known))

        def differs(parent: str, recorded: str) -> bool:
            made = known.get(parent)
            return made is not None and recorded not in (made.digest, made.digest_of_blobs)

        return {child.key for child in children if any(differs(*parent) for parent in child.parents.items())}

    def _dying(self, key: str) -> bool:
        found = self._objects.read(_tombstone(key))
        return found is not None and self._objects.now() - found.modified < DYING_SECONDS

    def _all_dying(self) -> set[str]:
        entries = list(self._objects.list(DYING))
        now = self._objects.now() if entries else 0.0
        return {_key(entry.path) for entry in entries if now - entry.modified < DYING_SECONDS}

    def _verify(self, manifest: Manifest) -> None:
        for blob in manifest.blobs:
            self.verify_blob(blob)

    def _discard_damaged(self, key: str) -> Manifest | None:
        """Put a marker in the place of a damaged manifest; return the manifest if it reads well the second time."""
        found = self._objects.get_versioned(_path(key))
        if found is None or len(found[0]) < _MARKER_LIMIT:
            return None
        manifest = Manifest.from_bytes(found[0])
        if manifest is None:
            # A store that is only read, or that refuses at this moment: the next reader meets the damage again.
            with contextlib.suppress(StoreError):
                self._objects.replace(_path(key), _marker(found[0], damaged=True), found[1])
        return manifest

    def _blob_path(self, attempt: str, name: str) -> str:
        with self._lock:
            folder, names = self._folders.get(attempt, ("", set()))
            if not folder or name in names:
                folder, names = secrets.token_hex(5), set()
                self._folders[attempt] = (folder, names)
            names.add(name)
        return f"blobs/{attempt}/{folder}/{name}"

    @staticmethod
    def _compare(blob: Blob, size: int | None, sha256: str) -> None:
        if size is None:
            cause = "the file is gone"
        elif size != blob.size:
            cause = f"{size} bytes instead of {blob.size}"
        elif sha256 != blob.sha256:
            cause = f"its sha256 is {sha256[:12]}... instead of {blob.sha256[:12]}..."
        else:
            return
        raise CorruptBlob(blob.artifact or "unknown", blob.path, cause)


def _path(key: str) -> str:
    return f"{FOLDER}/{key}.json"


def _tombstone(key: str) -> str:
    return f"{DYING}/{key}.json"


def _key(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".json")


def _generation(data: bytes) -> int:
    """The generation of a manifest or of a marker; 0 if the bytes are too damaged to tell."""
    try:
        return int(json.loads(data)["generation"])
    except (ValueError, KeyError, TypeError):
        return 0


def _marker(data: bytes, *, damaged: bool = False) -> bytes:
    return json.dumps({"generation": _generation(data), **({"damaged": 1} if damaged else {})}).encode()


def _is_damage(marker: bytes) -> bool:
    """Whether a marker says that its artifact was damaged; what is no marker is a manifest that was cut short."""
    try:
        return bool(json.loads(marker).get("damaged"))
    except (ValueError, AttributeError):
        return True

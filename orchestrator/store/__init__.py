"""The store is the truth: artifacts, claims, submissions, attempts and grid versions in one folder or bucket.

Layout: `store.json` (schema), `artifacts/<key>.json`, `blobs/<attempt>/`, `attempts/<attempt>/`, `claims/<stage>.json`,
`submissions/<batch>.json`, `grids/<name>/<digest>.json` (roots for retention), `tombstones/<key>.json`,
`index/` (what was read of manifests, never the truth).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.store import opening
from orchestrator.store.artifacts import Artifacts
from orchestrator.store.claims import Claims, ClaimState, Lease
from orchestrator.store.documents import parse, seal, sound
from orchestrator.store.index import Index
from orchestrator.store.manifest import Blob, Manifest
from orchestrator.store.objects import PATIENCE, Entry, Objects

__all__ = ["Artifacts", "Blob", "ClaimState", "Claims", "Entry", "Lease", "Manifest", "Objects", "Store"]

log = logging.getLogger(__name__)

SCHEMA = 1


class Store:
    """One open store: `objects`, `artifacts`, `claims`, JSON documents and the grids that keep artifacts alive."""

    def __init__(self, objects: Objects, *, reading: bool = False) -> None:
        """`reading`: leave a store that does not exist yet as it is; it reads as empty."""
        self.objects = objects
        self.artifacts = Artifacts(objects)
        self.claims = Claims(objects)
        self.index = Index(objects, self.artifacts)
        self._fixed: dict[str, dict[str, Any]] = {}
        self.exists = self._check_schema(make=not reading)

    @classmethod
    def open(cls, url: str, *, patience: float = PATIENCE) -> Store:
        """Open (and on first use prepare) the store at `url`; StoreError if it cannot be used."""
        return cls(opening.open_objects(url, patience=patience))

    @classmethod
    def peek(cls, url: str, *, patience: float = PATIENCE) -> Store:
        """Open the store at `url` to be read, `exists` or not: nothing is made, and writing raises StoreError."""
        return cls(opening.peek_objects(url, patience=patience), reading=True)

    @property
    def url(self) -> str:
        """The URL or absolute path that opens this store again, from any folder."""
        return self.objects.url

    def get_json(self, path: str) -> Any | None:
        """Return a JSON document, or None if it is absent or empty; StoreError if it is damaged."""
        data = self.objects.get(path)
        if not data:
            return None  # a power cut can leave an empty file
        try:
            return parse(data)
        except ValueError as error:
            raise StoreError(f"{path} in {self.url} is damaged", cause=str(error), hint=f"delete {path}") from error

    def find_json(self, path: str) -> dict[str, Any] | None:
        """Return a JSON object that can be done without; None as well, with a warning, if it is damaged."""
        try:
            found = self.get_json(path)
        except StoreError as error:
            if not isinstance(error.__cause__, ValueError):
                raise
            found = error
        if found is None or isinstance(found, dict):
            return found
        log.warning("%s in %s is damaged: it counts as absent", path, self.url)
        return None

    def find_fixed(self, path: str) -> dict[str, Any] | None:
        """Return what `find_json` finds of a document that is written once: it is read once."""
        found = self._fixed.get(path) or self.find_json(path)
        if found:
            self._fixed[path] = found
        return found

    def put_json(self, path: str, value: object) -> None:
        """Write or overwrite an advisory JSON document."""
        self.objects.put(path, json.dumps(value).encode())

    def create_json(self, path: str, value: object) -> bool:
        """Write a JSON document if it is absent; False if it exists."""
        return self.objects.create(path, seal(value))

    def write_root(self, name: str, digest: str, document: Mapping[str, object]) -> None:
        """Record a grid version, whose `keys` stay alive from now on; before a plan reads anything."""
        path, data = f"grids/{name}/{digest}.json", seal(document)
        if not self.objects.create(path, data):
            # Written again, so that the version planned last is the newest one.
            self.objects.put(path, data)

    def has_root(self, name: str, digest: str) -> bool:
        """Return whether this grid version is recorded, undamaged."""
        data = self.objects.get(f"grids/{name}/{digest}.json")
        return data is not None and sound(data)

    def roots(self) -> dict[str, dict[str, Any]]:
        """Return every grid version by its path.

        StoreError naming those that are damaged: what they keep alive is unknown, which is not the same as nothing.
        """
        paths = [entry.path for entry in self.objects.list("grids")]
        documents = self.objects.parallel(self.find_json, paths)
        found = dict(zip(paths, documents, strict=True))
        damaged = [path for path, document in found.items() if not _names_keys(document)]
        if damaged:
            raise StoreError(
                f"{len(damaged)} of {len(paths)} grid versions in {self.url} are damaged: {', '.join(damaged[:3])}",
                cause="what they keep cannot be told, so nothing is collected",
                hint="moegrid run GRID writes its present version again; delete the file of a version nobody needs",
            )
        return {path: document for path, document in found.items() if document is not None}

    def _check_schema(self, *, make: bool) -> bool:
        """Return whether there is a store, after creating `store.json` if it is to be made.

        That also proves that the store honours put-if-absent, on which commits stand.
        """
        document = self.get_json("store.json")
        if document is None and not make:
            return False
        if document is None:
            body = json.dumps({"schema": SCHEMA, "program": "moegrid"}).encode()
            self.objects.create("store.json", body)
            if (found := self.objects.get_versioned("store.json")) is not None and not found[0]:
                self.objects.replace("store.json", body, found[1])  # a power cut had emptied it
            if self.objects.create("store.json", body):
                raise StoreError(
                    f"{self.url} cannot be used as a store",
                    cause="it overwrites an object that was to be written only if absent",
                    hint="use a store that honours If-None-Match and If-Match",
                )
        elif not isinstance(document, dict):
            raise StoreError(
                f"store.json in {self.url} is damaged",
                cause=f"it holds {json.dumps(document)[:80]}",
                hint="delete store.json: the next command writes it again",
            )
        elif document.get("schema") != SCHEMA:
            raise StoreError(
                f"the store {self.url} has schema {document.get('schema')}; this moegrid knows {SCHEMA}",
                hint="use the moegrid version that made it, or a new store",
            )
        return True


def _names_keys(document: dict[str, Any] | None) -> bool:
    keys = None if document is None else document.get("keys")
    return isinstance(keys, list) and all(isinstance(key, str) for key in keys)
